// math.cuh: twin of cuda_src/ptx/math.cuh.
#pragma once

#include <cmath>

#include "emulator/floats.h"

namespace epcomm::ptx {

inline float lg2(float x) { return emulator::with_gpu_nan(std::log2(std::fpclassify(x) == FP_SUBNORMAL ? 0.0f : x)); }
inline float ex2(float x) { return emulator::with_gpu_nan(std::exp2(x)); }

}  // namespace epcomm::ptx
