// rows.cuh: a warp's pipe for rows: global memory -> shared memory -> one or more places in global memory.
//
// On sm_90 the copy engine moves a piece of a row with one instruction in and one out for each destination; pieces of
// kStages rows are under way at once. On sm_80 the lanes move 16 bytes each through registers.
#pragma once

#include "common/types.cuh"
#include "ptx/bulk.cuh"

namespace epcomm {

// How rows are cut: pieces of `piece_bytes`, the last one shorter. All are multiples of 16 bytes.
struct Pieces {
    uint32_t row_bytes, piece_bytes, num_pieces;
    __device__ uint32_t bytes_of(uint32_t piece) const {
        return piece + 1 < num_pieces ? piece_bytes : row_bytes - piece * piece_bytes;
    }
};

// Copy `num_bytes` from one place to `lane`-wise many: lane r gives the place of destination r, or 0.
__device__ inline void copy_by_lanes(const uint8_t* source, uint64_t destination, uint32_t num_bytes) {
    constexpr int kUnroll = 8;
    const uint32_t wanted = __ballot_sync(~0u, destination != 0);
    const Vector* from = reinterpret_cast<const Vector*>(source);
    const uint32_t num_vectors = num_bytes / sizeof(Vector);
    for (uint32_t first = 0; first < num_vectors; first += kUnroll * kWarp) {
        Vector values[kUnroll];
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            const uint32_t at = first + i * kWarp + lane_index();
            if (at < num_vectors) values[i] = from[at];
        }
        for (uint32_t rest = wanted; rest != 0; rest &= rest - 1) {
            Vector* to = pointer<Vector>(__shfl_sync(~0u, destination, __ffs(rest) - 1));
#pragma unroll
            for (int i = 0; i < kUnroll; ++i) {
                const uint32_t at = first + i * kWarp + lane_index();
                if (at < num_vectors) to[at] = values[i];
            }
        }
    }
}

#if __CUDA_ARCH__ >= 900

// Shared memory of one warp: kStages pieces and their barriers. Counts how many pieces went through.
template <int kStages> class RowPipe {
  public:
    __device__ RowPipe(uint8_t* shared, uint64_t* barriers, uint32_t stage_bytes)
        : shared_(shared), barriers_(barriers), stage_bytes_(stage_bytes), num_loaded_(0), num_stored_(0) {
        if (lane_index() < kStages) ptx::mbarrier_init(&barriers_[lane_index()], 1);
        ptx::fence_mbarrier_init();
        __syncwarp();
    }

    // Start loading a piece; its stage must be free (see `make_room`).
    __device__ void load(const uint8_t* source, uint32_t num_bytes) {
        const uint32_t stage = num_loaded_++ % kStages;
        if (lane_index() == 0) {
            ptx::mbarrier_arrive_expect_tx(&barriers_[stage], num_bytes);
            ptx::bulk_load(shared_ + stage * stage_bytes_, source, num_bytes, &barriers_[stage]);
        }
    }

    // Wait for the oldest loaded piece and start storing it: lane r to destination r, if that is not 0.
    __device__ void store(uint64_t destination, uint32_t num_bytes) {
        const uint32_t stage = num_stored_ % kStages, parity = num_stored_ / kStages & 1;
        ++num_stored_;
        ptx::mbarrier_wait(&barriers_[stage], parity);
        if (destination != 0) ptx::bulk_store(pointer<void>(destination), shared_ + stage * stage_bytes_, num_bytes);
        ptx::bulk_commit();
    }

    // Wait until the stage of the next load is free; the stores of the latest piece may go on, with several stages.
    __device__ void make_room() {
        ptx::bulk_wait_read<(kStages > 1 ? 1 : 0)>();
        __syncwarp();
    }

    // Wait until every store of this lane is complete.
    __device__ void finish() {
        ptx::bulk_wait_all();
        __syncwarp();
    }

  private:
    uint8_t* shared_;
    uint64_t* barriers_;
    uint32_t stage_bytes_;
    uint32_t num_loaded_, num_stored_;
};

// Move rows first, first + step, … below end. `source(i)`: address of row i. `destination(i)`: called once a row, by all
// lanes; lane r returns where row i goes at destination r, or 0.
template <int kStages, typename Source, typename Destination>
__device__ inline void move_rows(RowPipe<kStages>& pipe, const Pieces& pieces, int first, int end, int step,
                                 Source source, Destination destination) {
    constexpr int kAhead = kStages > 1 ? kStages - 1 : 1;
    int row = first, load_row = first;
    uint32_t piece = 0, load_piece = 0;
    auto load_next = [&] {
        if (load_row >= end) return;
        pipe.load(source(load_row) + static_cast<uint64_t>(load_piece) * pieces.piece_bytes, pieces.bytes_of(load_piece));
        if (++load_piece == pieces.num_pieces) load_piece = 0, load_row += step;
    };
    pipe.make_room();
    for (int i = 0; i < kAhead; ++i) load_next();
    uint64_t to = 0;
    while (row < end) {
        if (piece == 0) to = destination(row);
        const uint64_t offset = static_cast<uint64_t>(piece) * pieces.piece_bytes;
        pipe.store(to != 0 ? to + offset : 0, pieces.bytes_of(piece));
        if (++piece == pieces.num_pieces) piece = 0, row += step;
        pipe.make_room();
        load_next();
    }
}

#else

template <int kStages> class RowPipe {
  public:
    __device__ RowPipe(uint8_t*, uint64_t*, uint32_t) {}
    __device__ void finish() { __syncwarp(); }
};

template <int kStages, typename Source, typename Destination>
__device__ inline void move_rows(RowPipe<kStages>&, const Pieces& pieces, int first, int end, int step, Source source,
                                 Destination destination) {
    for (int row = first; row < end; row += step) {
        const uint64_t to = destination(row);
        copy_by_lanes(source(row), to, pieces.row_bytes);
    }
}

#endif

}  // namespace epcomm
