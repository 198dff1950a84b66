// pull.cuh: a warp's pipe for the pieces of one token's rows: from several places in global memory to shared memory.
//
// All pieces of a stage are under way before the first is read: a pull is bound by latency, not by the links. On sm_80
// rows are loaded by lanes, from where they are.
#pragma once

#include "common/types.cuh"
#include "ptx/bulk.cuh"

namespace epcomm {

#if __CUDA_ARCH__ >= 900

// Shared memory of one warp: kStages times as many pieces as there may be in one.
template <int kStages> class PullPipe {
  public:
    __device__ PullPipe(uint8_t* shared, uint64_t* barriers, uint32_t* masks, uint32_t piece_bytes, int most_pieces)
        : shared_(shared), barriers_(barriers), masks_(masks), piece_bytes_(piece_bytes),
          stage_bytes_(piece_bytes * most_pieces), num_loaded_(0), num_taken_(0) {
        if (lane_index() < kStages) ptx::mbarrier_init(&barriers_[lane_index()], 1);
        ptx::fence_mbarrier_init();
        __syncwarp();
    }

    // Of shared memory, for one of kStages.
    static __device__ uint64_t stage_bytes(uint32_t piece_bytes, int most_pieces) {
        return static_cast<uint64_t>(piece_bytes) * most_pieces;
    }

    // Start loading a piece from each address that is not 0; pieces lie in the order of the lanes.
    __device__ void load(uint64_t address, uint32_t num_bytes) {
        const uint32_t stage = num_loaded_++ % kStages;
        const uint32_t wanted = __ballot_sync(~0u, address != 0);
        if (lane_index() == 0) {
            masks_[stage] = wanted;
            ptx::mbarrier_arrive_expect_tx(&barriers_[stage], __popc(wanted) * num_bytes);
        }
        __syncwarp();
        const int place = __popc(wanted & ((1u << lane_index()) - 1));
        if (address != 0)
            ptx::bulk_load(shared_ + stage * stage_bytes_ + place * piece_bytes_, pointer<void>(address), num_bytes,
                           &barriers_[stage]);
    }

    // Wait for the oldest pieces: the lanes that had an address, a bit each.
    __device__ uint32_t wait() {
        const uint32_t stage = num_taken_ % kStages, parity = num_taken_ / kStages & 1;
        ++num_taken_;
        ptx::mbarrier_wait(&barriers_[stage], parity);
        first_ = ptx::shared_address(shared_ + stage * stage_bytes_);
        return masks_[stage];
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
    uint32_t* masks_;
    uint32_t piece_bytes_, stage_bytes_;
    uint32_t num_loaded_, num_taken_, first_ = 0;
};

#else

// Without a copy engine pieces stay where they are, and only their addresses are kept: 8 bytes for each in a stage.
template <int kStages> class PullPipe {
  public:
    __device__ PullPipe(uint8_t* shared, uint64_t*, uint32_t* masks, uint32_t, int most_pieces)
        : addresses_(reinterpret_cast<uint64_t*>(shared)), masks_(masks), most_pieces_(most_pieces) {}

    static __device__ uint64_t stage_bytes(uint32_t, int most_pieces) { return most_pieces * sizeof(uint64_t); }

    __device__ void load(uint64_t address, uint32_t) {
        const uint32_t stage = num_loaded_++ % kStages;
        const uint32_t wanted = __ballot_sync(~0u, address != 0);
        const int place = __popc(wanted & ((1u << lane_index()) - 1));
        if (lane_index() == 0) masks_[stage] = wanted;
        if (address != 0) addresses_[stage * most_pieces_ + place] = address;
        __syncwarp();
    }
    __device__ uint32_t wait() {
        const uint32_t stage = num_taken_++ % kStages;
        first_ = addresses_ + stage * most_pieces_;
        return masks_[stage];
    }
    // A plain load: what peers wrote must not come through the read-only cache.
    __device__ Vector get(int place, uint32_t at) const { return *pointer<const Vector>(first_[place] + at); }
    __device__ void release() { __syncwarp(); }

  private:
    uint64_t* addresses_;
    uint32_t* masks_;
    int most_pieces_;
    uint32_t num_loaded_ = 0, num_taken_ = 0;
    const uint64_t* first_ = nullptr;
};

#endif

// All lanes: rows 0, 1, … of `num_rows`, each in pieces of `piece_bytes`, the last one shorter, from several places.
// `address(i)`: called once a row; a lane returns where its row i is, or 0. `use(i, piece, mask)`: the pieces are there, of
// the lanes in `mask`.
template <int kStages, typename Address, typename Use>
__device__ inline void pull_rows(PullPipe<kStages>& pipe, uint32_t row_bytes, uint32_t piece_bytes, int num_rows,
                                 Address address, Use use) {
    constexpr int kAhead = kStages > 1 ? kStages - 1 : 1;
    const uint32_t num_pieces = (row_bytes + piece_bytes - 1) / piece_bytes;
    int row = 0, load_row = 0;
    uint32_t piece = 0, load_piece = 0;
    uint64_t from = 0;
    auto load_next = [&] {
        if (load_row >= num_rows) return;
        if (load_piece == 0) from = address(load_row);
        const uint32_t at = load_piece * piece_bytes;
        pipe.load(from != 0 ? from + at : 0, min(piece_bytes, row_bytes - at));
        if (++load_piece == num_pieces) load_piece = 0, ++load_row;
    };
    for (int i = 0; i < kAhead; ++i) load_next();
    while (row < num_rows) {
        if (kStages > 1) load_next();
        const uint32_t mask = pipe.wait();
        use(row, piece, mask);
        pipe.release();
        if (++piece == num_pieces) piece = 0, ++row;
        if (kStages == 1) load_next();
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
