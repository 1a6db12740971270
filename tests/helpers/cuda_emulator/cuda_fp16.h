// Stands for CUDA's header of IEEE half precision: a tag type and its storage are all that the kernels use.
#pragma once

struct __half {
  _Float16 value;
};
