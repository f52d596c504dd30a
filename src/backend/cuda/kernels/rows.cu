// Arrays seen as [rows, c]: biases, sums of columns, channels copied in and out.

extern "C" __global__ void bias(real *y, const float *b, unsigned n, unsigned c, int w, int relu) {
    unsigned i = INDEX * w;
    if (i >= n) return;
    unsigned ch = i % c;
    float v[PACK];
    take(y + i, w, v);
    LANES {
        v[k] += b[ch + k];
        if (relu && v[k] < 0.0f) v[k] = 0.0f;
    }
    put(y + i, w, v);
}

// Column sums of one part of the rows: parts[part][c]. `lanes` threads stand side by side over channels. Where there is `y`, x
// is first carried through the relu whose output that is, and written to `gx`.
extern "C" __global__ void column_sums(const real *x, const real *y, real *gx, float *parts, unsigned rows, unsigned c, int w,
                                       int lanes, unsigned rows_of_part) {
    __shared__ float s[PACK * BLOCK];
    unsigned ch = (blockIdx.x * lanes + threadIdx.x % lanes) * w;
    unsigned row = blockIdx.y * rows_of_part, end = row + rows_of_part < rows ? row + rows_of_part : rows;
    float sum[PACK], v[PACK];
    for (int k = 0; k < PACK; k++) sum[k] = 0.0f;
    if (ch < c) {
        BATCHES {
            pack p[4], q[4];
            BATCH {
                p[j] = fetch(x + (count)ROW_OF_BATCH * c + ch, w);
                if (y) q[j] = fetch(y + (count)ROW_OF_BATCH * c + ch, w);
            }
            BATCH {
                for (int k = 0; k < PACK; k++) v[k] = y && !(load(q[j].v[k]) > 0.0f) ? 0.0f : load(p[j].v[k]);
                for (int k = 0; k < PACK; k++) sum[k] += v[k];
                if (y) put(gx + (count)ROW_OF_BATCH * c + ch, w, v);
            }
        }
    }
    fold(sum, s, lanes);
    if ((int)threadIdx.x < lanes && ch < c) {
        LANES parts[(count)blockIdx.y * c + ch + k] = s[k * BLOCK + threadIdx.x];
    }
}

// sum[c] += the parts of `column_sums`. Blocks of 32 channels.
extern "C" __global__ void column_total(const float *parts, int number, unsigned c, float *sum) {
    __shared__ float s[BLOCK];
    unsigned ch = blockIdx.x * 32 + threadIdx.x % 32;
    float v[1] = {0.0f};
    if (ch < c) {
        for (int p = threadIdx.x / 32; p < number; p += BLOCK / 32) v[0] += parts[(count)p * c + ch];
    }
    fold(v, s, 32);
    if (threadIdx.x < 32 && ch < c) sum[ch] += s[threadIdx.x];
}

// to[row][to_first + j] = from[row][from_first + j] for `width` channels j; n = rows * width.
extern "C" __global__ void copy_channels(const real *from, real *to, unsigned n, unsigned width, unsigned from_c,
                                         unsigned from_first, unsigned to_c, unsigned to_first, int w) {
    unsigned i = INDEX * w;
    if (i >= n) return;
    unsigned row = i / width, j = i % width;
    float v[PACK];
    take(from + (count)row * from_c + from_first + j, w, v);
    put(to + (count)row * to_c + to_first + j, w, v);
}
