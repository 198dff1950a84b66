// async.cuh: twin of cuda_src/ptx/async.cuh.
#pragma once

#include "emulator/copies.h"
#include "ptx/memory.cuh"

namespace epcomm::ptx {

inline void async_copy(uint32_t shared, const void* global, bool is_there,
                       emulator::Where where = emulator::Where::here()) {
    emulator::begin_copy(shared, global, is_there, where);
}

inline void async_commit() { emulator::commit_copies(); }

template <int kPending> inline void async_wait() { emulator::wait_for_copies(kPending); }

}  // namespace epcomm::ptx
