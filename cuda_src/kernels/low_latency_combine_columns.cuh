// low_latency_combine_columns.cuh: the rows of a piece of a token, added column by column in a given order.
#pragma once

#include "common/logfmt.cuh"
#include "kernels/low_latency_combine.cuh"
#include "ptx/async.cuh"

namespace epcomm {

inline constexpr int kDepth = 10;  // columns that a warp has on their way

// What a warp sums: a piece of a token, its rows in a side of the warp's shared memory.
struct Work {
    int num_rows;  // -1: there is none
    uint32_t begin, num_bytes;  // of a row, before it is encoded
    uint64_t out;

    __device__ uint32_t num_columns() const { return (num_bytes + kColumn - 1) / kColumn; }
};

// Columns of rows on their way to shared memory. Each lane copies, and reads back, its own 16 bytes of a column. Rows of
// the work behind follow those of the present one.
class PlainColumns {
  public:
    __device__ PlainColumns(const LowLatencyCombineArgs&, uint32_t ring, const uint64_t (&address)[2][kMaxTopk])
        : ring_(ring), address_(address) {}

    // All lanes: `side` is behind what is on its way already.
    __device__ void append(const Work& work, int side) {
        next_num_rows_ = work.num_rows, next_num_bytes_ = work.num_bytes, next_side_ = side;
        fill();
    }

    // All lanes: the sum of the next column.
    __device__ Sum sum_next(const Work& work, int, uint32_t, const float* weight) {
        Sum sum;
#pragma unroll 1
        for (int row = 0; row < work.num_rows; ++row) sum.add_weighted(weight[row], take());
        return sum;
    }

  private:
    __device__ Vector take() {
        if (num_under_way_ == kDepth - 1) {
            ptx::async_wait<kDepth - 2>();
        } else {
            ptx::async_wait<0>();
        }
        const Vector value = ptx::ld_shared(ring_ + first_ * kColumn);
        if (++first_ == kDepth) first_ = 0;
        --num_under_way_;
        fill();
        return value;
    }

    __device__ void fill() {
#pragma unroll 1
        while (num_under_way_ < kDepth - 1) {
            if (at_ >= num_bytes_ || num_rows_ <= 0) {  // the same for all lanes: both are multiples of a column, but the end
                if (next_num_rows_ < 0) return;
                num_rows_ = next_num_rows_, num_bytes_ = next_num_bytes_, side_ = next_side_;
                next_num_rows_ = -1, at_ = 0, row_ = 0;
                continue;
            }
            const uint32_t byte = at_ + lane_index() * sizeof(Vector);
            // Peers' rows, behind an acquire; not through the read-only cache.
            ptx::async_copy(ring_ + last_ * kColumn, pointer<const void>(address_[side_][row_] + byte), byte < num_bytes_);
            ptx::async_commit();
            if (++last_ == kDepth) last_ = 0;
            ++num_under_way_;
            if (++row_ == num_rows_) row_ = 0, at_ += kColumn;
        }
    }

    uint32_t ring_;
    const uint64_t (&address_)[2][kMaxTopk];
    int num_under_way_ = 0, num_rows_ = 0, row_ = 0, side_ = 0, next_num_rows_ = -1, next_side_ = 0;
    uint32_t num_bytes_ = 0, at_ = 0, next_num_bytes_ = 0;
    uint32_t first_ = 0, last_ = 0;  // stages of the ring: of the next column to be taken, and to be loaded
};

// Columns of two groups of channels in LogFMT, read where they are.
class EncodedColumns {
  public:
    __device__ EncodedColumns(const LowLatencyCombineArgs& args, uint32_t, const uint64_t (&address)[2][kMaxTopk])
        : hidden_(args.row_bytes / 2), address_(address) {}

    __device__ void append(const Work&, int) {}

    // Any lane: the sum of the column `at` bytes behind the begin of the piece, rows in `side`.
    __device__ Sum sum_next(const Work& work, int side, uint32_t at, const float* weight) {
        Sum sum;
        if (at >= work.num_bytes) return sum;
        const uint32_t group = (work.begin + at) / (2 * kLogfmtBlock);
#pragma unroll 1
        for (int first = 0; first < work.num_rows; first += kRowsAtOnce) {
            LogfmtCodes codes[kRowsAtOnce];
            uint32_t words[kRowsAtOnce];
#pragma unroll
            for (int n = 0; n < kRowsAtOnce; ++n) {
                if (first + n >= work.num_rows) break;
                const uint8_t* row = pointer<const uint8_t>(address_[side][first + n]);
                codes[n] = load_logfmt(row, group);
                words[n] = *reinterpret_cast<const uint32_t*>(row + logfmt_word_offset(hidden_, group));
            }
#pragma unroll
            for (int n = 0; n < kRowsAtOnce; ++n)
                if (first + n < work.num_rows) add(weight[first + n], codes[n], words[n], sum);
        }
        return sum;
    }

  private:
    static constexpr int kRowsAtOnce = 4;

    static __device__ void add(float weight, const LogfmtCodes& codes, uint32_t word, Sum& sum) {
        float x[kLogfmtLane];
        decode_logfmt(codes, word, x);
#pragma unroll
        for (int i = 0; i < kLogfmtLane; ++i) sum.value[i] = accumulate_weighted(sum.value[i], weight, x[i]);
    }

    uint32_t hidden_;
    const uint64_t (&address_)[2][kMaxTopk];
};

template <Payload payload> struct ColumnsOf { using Type = PlainColumns; };
template <> struct ColumnsOf<kEncodedRows> { using Type = EncodedColumns; };
using Columns = ColumnsOf<kPayload>::Type;

}  // namespace epcomm
