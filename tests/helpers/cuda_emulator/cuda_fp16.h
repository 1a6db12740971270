// IEEE half precision, as the tag and the storage that the kernels use it for.
#pragma once

struct __half {
  _Float16 value;
};
