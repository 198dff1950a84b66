// pull.cuh: a warp's pipe for the pieces of one token's rows: from several places in global memory to shared memory.
//
// All pieces of a stage are under way before the first is read: a pull is bound by latency, not by the links. On sm_80
// rows are loaded by lanes, from where they are.
#pragma once

#include "common/types.cuh"
#include "ptx/bulk.cuh"

namespace epcomm {

inline constexpr uint32_t kPullUnit = kWarp * sizeof(Vector);  // bytes that a warp takes at once

// The pieces of `count` rows that fit a stage together: as long as they can be, of about equal length, the last one
// shorter. With few rows they are long, so that as much is under way as with many.
__device__ __noinline__ uint32_t cut_for(uint32_t row_bytes, uint32_t stage_bytes, int count) {
    if (count == 0) return row_bytes;
    const uint32_t most = max(stage_bytes / count / kPullUnit, 1u) * kPullUnit;
    const uint32_t num_pieces = (row_bytes + most - 1) / most;
    return min(static_cast<uint32_t>(round_up((row_bytes + num_pieces - 1) / num_pieces, kPullUnit)), row_bytes);
}

// What a pipe knows of a stage.
struct Pulled {
    uint32_t lanes;        // that have a piece, a bit each
    uint32_t piece_bytes;  // of each, at most
};

#if __CUDA_ARCH__ >= 900

// Shared memory of one warp: kStages times the pieces of a row from all places where there is one.
template <int kStages> class PullPipe {
  public:
    __device__ PullPipe(uint8_t* shared, uint64_t* barriers, Pulled* pulled, uint32_t stage_bytes)
        : shared_(shared), barriers_(barriers), pulled_(pulled), stage_bytes_(stage_bytes), num_loaded_(0),
          num_taken_(0) {
        if (lane_index() < kStages) ptx::mbarrier_init(&barriers_[lane_index()], 1);
        ptx::fence_mbarrier_init();
        __syncwarp();
    }

    // All lanes: how a row is cut that lies in `count` places.
    __device__ uint32_t cut(uint32_t row_bytes, int count) const { return cut_for(row_bytes, stage_bytes_, count); }

    // Start loading a piece from each address that is not 0; pieces lie in the order of the lanes, `piece_bytes` apart.
    __device__ void load(uint64_t address, uint32_t piece_bytes, uint32_t num_bytes) {
        const uint32_t stage = num_loaded_++ % kStages;
        const uint32_t wanted = __ballot_sync(~0u, address != 0);
        if (lane_index() == 0) {
            pulled_[stage] = {wanted, piece_bytes};
            ptx::mbarrier_arrive_expect_tx(&barriers_[stage], __popc(wanted) * num_bytes);
        }
        __syncwarp();
        const int place = __popc(wanted & ((1u << lane_index()) - 1));
        if (address != 0)
            ptx::bulk_load(shared_ + stage * stage_bytes_ + place * piece_bytes, pointer<void>(address), num_bytes,
                           &barriers_[stage]);
    }

    // Wait for the oldest pieces.
    __device__ Pulled wait() {
        const uint32_t stage = num_taken_ % kStages, parity = num_taken_ / kStages & 1;
        ++num_taken_;
        ptx::mbarrier_wait(&barriers_[stage], parity);
        const Pulled pulled = pulled_[stage];
        first_ = ptx::shared_address(shared_ + stage * stage_bytes_);
        piece_bytes_ = pulled.piece_bytes;
        return pulled;
    }

    // Of those, 16 bytes of the piece at a place.
    __device__ Vector get(int place, uint32_t at) const { return ptx::ld_shared(first_ + place * piece_bytes_ + at); }

    // After the last read of a stage by all lanes, before it is loaded again.
    __device__ void release() {
        ptx::fence_proxy_async_shared();
        __syncwarp();
    }

  private:
    uint8_t* shared_;
    uint64_t* barriers_;
    Pulled* pulled_;
    uint32_t stage_bytes_;
    uint32_t num_loaded_, num_taken_, first_ = 0, piece_bytes_ = 0;
};

#else

// Without a copy engine pieces stay where they are, and only their addresses are kept: 8 bytes for each in a stage.
template <int kStages> class PullPipe {
  public:
    __device__ PullPipe(uint8_t* shared, uint64_t*, Pulled* pulled, uint32_t stage_bytes)
        : addresses_(reinterpret_cast<uint64_t*>(shared)), pulled_(pulled),
          most_pieces_(stage_bytes / sizeof(uint64_t)) {}

    __device__ uint32_t cut(uint32_t row_bytes, int) const { return row_bytes; }

    __device__ void load(uint64_t address, uint32_t piece_bytes, uint32_t) {
        const uint32_t stage = num_loaded_++ % kStages;
        const uint32_t wanted = __ballot_sync(~0u, address != 0);
        const int place = __popc(wanted & ((1u << lane_index()) - 1));
        if (lane_index() == 0) pulled_[stage] = {wanted, piece_bytes};
        if (address != 0) addresses_[stage * most_pieces_ + place] = address;
        __syncwarp();
    }
    __device__ Pulled wait() {
        const uint32_t stage = num_taken_++ % kStages;
        first_ = addresses_ + stage * most_pieces_;
        return pulled_[stage];
    }
    // A plain load: what peers wrote must not come through the read-only cache.
    __device__ Vector get(int place, uint32_t at) const { return *pointer<const Vector>(first_[place] + at); }
    __device__ void release() { __syncwarp(); }

  private:
    uint64_t* addresses_;
    Pulled* pulled_;
    int most_pieces_;
    uint32_t num_loaded_ = 0, num_taken_ = 0;
    const uint64_t* first_ = nullptr;
};

#endif

// A piece of a row that is there, from the lanes in `lanes`.
struct PulledPiece {
    int row;
    uint32_t begin, num_bytes, lanes;
};

// All lanes: rows 0, 1, … of `num_rows`, each of `row_bytes` from several places. `address(i)`: called once a row; a lane
// returns where its row i is, or 0. `use(piece)`: called for all pieces, in order, those of rows from nowhere too.
template <int kStages, typename Address, typename Use>
__device__ inline void pull_rows(PullPipe<kStages>& pipe, uint32_t row_bytes, int num_rows, Address address, Use use) {
    constexpr int kAhead = kStages > 1 ? kStages - 1 : 1;
    int load_row = 0;
    uint32_t load_at = 0, piece_bytes = 0;
    uint64_t from = 0;
    PulledPiece piece = {0, 0, 0, 0};
    // One loop for all, as short as can be: warps of several roles share the instruction cache of an SM.
#pragma unroll 1
    for (int num_waiting = 0; piece.row < num_rows;) {
        if (load_row < num_rows && num_waiting < kStages) {
            if (load_at == 0) {
                from = address(load_row);
                piece_bytes = pipe.cut(row_bytes, __popc(__ballot_sync(~0u, from != 0)));
            }
            pipe.load(from != 0 ? from + load_at : 0, piece_bytes, min(piece_bytes, row_bytes - load_at));
            load_at += piece_bytes;
            if (load_at >= row_bytes) load_at = 0, ++load_row;
            if (++num_waiting <= kAhead && kStages > 1) continue;
        }
        const Pulled pulled = pipe.wait();
        piece.num_bytes = min(pulled.piece_bytes, row_bytes - piece.begin);
        piece.lanes = pulled.lanes;
        use(piece);
        pipe.release();
        --num_waiting;
        piece.begin += pulled.piece_bytes;
        if (piece.begin >= row_bytes) piece.begin = 0, ++piece.row;
    }
}

// One warp: the first of the rows [first, end), which are sorted by token, whose token is not below `token`.
__device__ inline int lower_bound(const int32_t* tokens, int first, int end, int token) {
    while (first < end) {
        const int step = (end - first + kWarp - 1) / kWarp;
        const int probe = first + lane_index() * step;
        const int below = __popc(__ballot_sync(~0u, probe < end && tokens[min(probe, end - 1)] < token));
        end = min(end, first + below * step);
        if (below > 0) first += (below - 1) * step + 1;
    }
    return first;
}

}  // namespace epcomm
