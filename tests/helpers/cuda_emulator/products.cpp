// wgmma: products of a warpgroup in the background.
//
// The descriptor of b, from the PTX ISA ("Matrix Descriptor Format") and CUTLASS (mma_traits_sm90_gmma.hpp,
// mma_sm90_desc.hpp): bits 0-13 are the address, 16-29 the leading dimension's byte offset, 32-45 the stride
// dimension's, each without its four lowest bits; 49-51 a base offset and 62-63 the swizzling, 0 for none.
// Without swizzling and K-major the layout in units of 16 bytes is ((8, n), 2) : ((1, SBO), LBO): eight
// columns n of b lie 16 bytes apart, each with 8 values of k; SBO leads to the next eight columns, LBO to the
// next eight values of k.
//
// The fragments, from the ISA's figures of wgmma.mma_async.m64nNk16: with g = lane / 4 and t = lane % 4, d_i
// is in row 16 warp + g, + 8 where i / 2 is odd, and column 8 (i / 4) + 2 t + i % 2; the halves a_i are in
// row 16 warp + g, + 8 where i / 2 is odd, and column 2 t + i % 2, + 8 where i >= 4.
//
// wgmma.fence has to stand between any access to registers of a or d and the first product on them; between
// products of one shape on the same d it need not. Here: before the first product on a d since the last
// commit or wait, and between a pack() and the next product. All of a warpgroup's products are done when one
// of its threads has waited for them: CUTLASS's pipelines release a buffer by one thread of a warpgroup, too.
#include <algorithm>

#include "state.h"

namespace mopo::emulator {
namespace {

// A signalling NaN. Arithmetic with it gives a NaN with other bits, which shows that an accumulator was used.
constexpr uint32_t kPoison = 0x7FA0DEAD;

struct Layout {
  uint32_t start, next_rows, next_columns;
};

Layout decode(uint64_t matrix) {
  if (matrix >> 62 != 0 || (matrix >> 49 & 7) != 0) fail("a matrix with swizzling or a base offset");
  constexpr uint64_t kField = 0x3FFF;
  return {static_cast<uint32_t>((matrix & kField) << 4), static_cast<uint32_t>((matrix >> 16 & kField) << 4),
          static_cast<uint32_t>((matrix >> 32 & kField) << 4)};
}

// Calls visit(offset in shared memory, half of k, block of columns) for each core of 8 columns by 8 rows.
template <class Visit>
void for_each_core(uint64_t matrix, int columns, const Visit& visit) {
  const Layout layout = decode(matrix);
  for (int half = 0; half < 2; ++half)
    for (int block = 0; block < columns / 8; ++block)
      visit(layout.start - kSharedWindow + half * layout.next_rows + block * layout.next_columns, half,
            block);
}

int row_of(int thread) { return 16 * (thread / 32) + thread % 32 / 4; }

// Calls visit(register, position in a row-major [64, columns]) for each of a thread's registers of d.
template <class Visit>
void for_each_register(int thread, int columns, const Visit& visit) {
  const int row = row_of(thread), column = 2 * (thread % 4);
  for (int i = 0; i < columns / 2; ++i)
    visit(i, (row + 8 * (i / 2 % 2)) * columns + 8 * (i / 4) + column + i % 2);
}

float half_to_float(uint16_t bits) {
  _Float16 half;
  memcpy(&half, &bits, sizeof half);
  return static_cast<float>(half);
}

float to_float(Operands type, uint16_t bits) {
  return type == Operands::kHalf ? half_to_float(bits) : __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

void read_a(const Product& product, float (&a)[64][16]) {
  for (int thread = 0; thread < 128; ++thread)
    for (int i = 0; i < 8; ++i)
      a[row_of(thread) + 8 * (i / 2 % 2)][2 * (thread % 4) + i % 2 + 8 * (i / 4)] =
          to_float(product.type, static_cast<uint16_t>(product.a[thread][i / 2] >> 16 * (i % 2)));
}

// Reads b as [k][column]. Fails unless bulk copies have brought it: threads' writes would take a proxy fence.
void read_b(const Product& product, Block& block, float (&b)[16][256]) {
  for_each_core(product.matrix, product.d->columns, [&](uint32_t core, int half, int columns) {
    if (memcmp(block.at(core), block.copied->bytes + core, 128) != 0)
      fail("block %d: b of a product at +%u, which threads have written to", block.index, core);
    for (int column = 0; column < 8; ++column)
      for (int k = 0; k < 8; ++k) {
        uint16_t bits;
        memcpy(&bits, block.at(core + 16 * column + 2 * k), sizeof bits);
        b[8 * half + k][8 * columns + column] = to_float(product.type, bits);
      }
  });
}

// Fails unless b has landed. Notes the barriers at which it did: the threads must have waited for these.
void find_landings(Product& product, Warpgroup& warpgroup, uint64_t products) {
  Block& block = *warpgroup.block;
  for_each_core(product.matrix, product.d->columns, [&](uint32_t core, int, int) {
    if (core % 16 != 0 || core + 128u > static_cast<uint32_t>(block.shared))
      fail("b of a product at +%u, beyond the shared memory", core);
    for (uint32_t at = core; at < core + 128; at += 16) {
      Unit& unit = block.units[at / 16];
      if (unit.copy != Unit::kLanded)
        fail("b of a product at +%u, where %s", at,
             unit.copy == Unit::kNothing ? "no bulk copy was made" : "a bulk copy has not landed yet");
      unit.products[warpgroup.index] = products;
      const auto landing = std::make_pair(unit.barrier, unit.phase + 1);
      if (std::find(product.landings.begin(), product.landings.end(), landing) == product.landings.end())
        product.landings.push_back(landing);
    }
  });
}

// The thread's accumulator in flight whose registers begin at d, or null.
Flight* flight_of(Thread& thread, const float* d) {
  for (Flight& flight : thread.flights)
    if (flight.home == d) return &flight;
  return nullptr;
}

}  // namespace

std::string Warpgroup::describe(const Thread& who) const {
  return text(
      "products_wait, of %lld products %lld are done, the next was issued by %d threads of 128",
      static_cast<long long>(who.issued), static_cast<long long>(executed),
      executed - first < static_cast<int64_t>(products.size()) ? products[executed - first].issued : 0);
}

bool Warpgroup::can_execute() const {
  const int64_t next = executed - first;
  return next < static_cast<int64_t>(products.size()) && products[next].issued == 128;
}

void Warpgroup::execute() {
  Product& product = products[executed - first];
  float a[64][16], b[16][256];
  read_a(product, a);
  read_b(product, *block, b);
  const int columns = product.d->columns;
  for (int row = 0; row < 64; ++row) {
    float* d = product.d->value.data() + row * columns;
    for (int column = 0; column < columns; ++column) {
      float sum = d[column];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      d[column] = sum;
    }
  }
  ++executed;
  wake();
}

void products_begin() {
  self->begun = true;
  self->packed = false;
}

void multiply_add(Operands type, float* d, int count, const uint32_t (&a)[4], uint64_t matrix) {
  pause();
  Thread& thread = *self;
  Warpgroup& warpgroup = *thread.warpgroup;
  const int columns = 2 * count, place = thread.index % 128;
  Flight* flight = flight_of(thread, d);
  if (thread.packed) fail("a product without products_begin since a pack()");
  if (flight == nullptr && !thread.begun) fail("a product into a d without products_begin");
  for (const Flight& other : thread.flights)
    if (&other != flight && other.home < d + count && d < other.home + other.d->columns / 2)
      fail("a product into a d that overlaps another in flight");

  const int64_t index = thread.issued++ - warpgroup.first;
  if (index == static_cast<int64_t>(warpgroup.products.size())) {
    Product& product = warpgroup.products.emplace_back();
    product.type = type;
    product.matrix = matrix;
    product.d = flight ? flight->d : std::make_shared<Accumulator>();
    product.d->columns = columns;
    product.d->value.resize(64 * columns);
    find_landings(product, warpgroup, thread.issued);
  }
  Product& product = warpgroup.products[index];
  if (product.type != type || product.matrix != matrix || product.d->columns != columns)
    fail("a product of %d columns by the matrix %llx where others of its warpgroup have %d by %llx", columns,
         static_cast<unsigned long long>(matrix), product.d->columns,
         static_cast<unsigned long long>(product.matrix));
  for (const auto& [barrier, phases] : product.landings)
    if (thread.clock.of(barrier->number) < phases)
      fail("a product by b that landed in phase %llu of the barrier at +%u, which it has not waited for",
           static_cast<unsigned long long>(phases - 1), barrier->offset);
  if (flight ? flight->d != product.d : product.d->home[place] != nullptr)
    fail("a product into another d than that of the others of its warpgroup");
  if (flight == nullptr) {
    product.d->home[place] = d;
    for_each_register(place, columns, [&](int i, int at) { product.d->value[at] = d[i]; });
    flight = &thread.flights.emplace_back(Flight{product.d, d, 0});
  }
  flight->last = thread.issued - 1;
  std::copy_n(a, 4, product.a[place].begin());
  std::fill_n(reinterpret_cast<uint32_t*>(d), count, kPoison);
  ++product.issued;
}

void products_commit() {
  pause();
  Thread& thread = *self;
  std::vector<int64_t>& ends = thread.warpgroup->group_ends;
  if (thread.groups == static_cast<int64_t>(ends.size())) ends.push_back(thread.issued);
  if (ends[thread.groups] != thread.issued)
    fail("products_commit after %lld products, others of its warpgroup after %lld",
         static_cast<long long>(thread.issued), static_cast<long long>(ends[thread.groups]));
  ++thread.groups;
  thread.begun = false;
}

void products_wait(int pending) {
  pause();
  Thread& thread = *self;
  Warpgroup& warpgroup = *thread.warpgroup;
  thread.begun = false;
  if (thread.groups <= pending) return;
  const int64_t end = warpgroup.group_ends[thread.groups - pending - 1];
  while (warpgroup.executed < end) wait_for(warpgroup);
  for (; warpgroup.first < end; ++warpgroup.first) warpgroup.products.pop_front();
  thread.clock.learn(warpgroup.number, end);
  std::erase_if(thread.flights, [&](const Flight& flight) {
    if (flight.last >= end) return false;
    for_each_register(thread.index % 128, flight.d->columns, [&](int i, int at) {
      if (__float_as_uint(flight.home[i]) != kPoison) fail("d was written to while products add to it");
      flight.home[i] = flight.d->value[at];
    });
    return true;
  });
}

}  // namespace mopo::emulator
