// Updates of all parameters of a module at once. A table holds ROW words a parameter: addresses of value, gradient, two
// buffers and the rounded copy (0 where there is none), the length, whether weight decay applies, and the address of the
// moving average (0 where there is none); `pieces` two words a block: which parameter, and from which element. Sums of squares are of
// doubles, as on the CPU.
#define PIECE 4096
#define ROW 8

#define PARAMETER                                                                      \
    const count *row = table + pieces[2 * blockIdx.x] * ROW;                           \
    float *value = (float *)row[0], *gradient = (float *)row[1];                       \
    float *first = (float *)row[2];                                                    \
    real *rounded = (real *)row[4];                                                    \
    count start = pieces[2 * blockIdx.x + 1], end = start + PIECE < row[5] ? start + PIECE : row[5]

#define STEP                                                                           \
    if (state[2] == 0.0f) return;                                                      \
    PARAMETER;                                                                         \
    float factor = state[1];                                                           \
    for (count i = start + threadIdx.x; i < end; i += BLOCK)

#define DONE                                                                           \
    value[i] = p;                                                                      \
    gradient[i] = 0.0f;                                                                \
    if (rounded) rounded[i] = store(p)

// sum += x for each row of a table of three words: the addresses of x and sum, and the length.
extern "C" __global__ void accumulate(const count *table, const count *pieces) {
    const count *row = table + pieces[2 * blockIdx.x] * 3;
    const real *x = (const real *)row[0];
    float *sum = (float *)row[1], v[PACK], s[PACK];
    count start = pieces[2 * blockIdx.x + 1], end = start + PIECE < row[2] ? start + PIECE : row[2];
    for (count i = start + threadIdx.x * PACK; i < end; i += BLOCK * PACK) {
        int w = end - i < PACK ? (int)(end - i) : PACK;
        take(x + i, w, v);
        take_floats(sum + i, w, s);
        for (int k = 0; k < PACK; k++) s[k] += v[k];
        put_floats(sum + i, w, s);
    }
}

extern "C" __global__ void gradient_squares(const count *table, const count *pieces, double *squares) {
    __shared__ double s[BLOCK];
    const count *row = table + pieces[2 * blockIdx.x] * ROW;
    const float *gradient = (const float *)row[1];
    count start = pieces[2 * blockIdx.x + 1], end = start + PIECE < row[5] ? start + PIECE : row[5];
    double sum = 0.0;
    for (count i = start + threadIdx.x; i < end; i += BLOCK) sum += (double)gradient[i] * (double)gradient[i];
    s[threadIdx.x] = sum;
    for (int half = BLOCK / 2; half > 0; half /= 2) {
        __syncthreads();
        if ((int)threadIdx.x < half) s[threadIdx.x] += s[threadIdx.x + half];
    }
    if (threadIdx.x == 0) squares[blockIdx.x] = s[0];
}

// One block. state: the norm of the gradients over `divisor`; what to multiply them with; 1 if the norm is finite, else 0.
extern "C" __global__ void gradient_norm(const double *squares, int number, double divisor, double clip, float *state) {
    __shared__ double s[BLOCK];
    double sum = 0.0;
    for (int j = threadIdx.x; j < number; j += BLOCK) sum += squares[j];
    s[threadIdx.x] = sum;
    for (int half = BLOCK / 2; half > 0; half /= 2) {
        __syncthreads();
        if ((int)threadIdx.x < half) s[threadIdx.x] += s[threadIdx.x + half];
    }
    if (threadIdx.x != 0) return;
    double norm = sqrt(s[0]) / divisor, most = clip / (norm + 1e-6);
    state[0] = (float)norm;
    state[1] = (float)((clip > 0.0 && most < 1.0 ? most : 1.0) / divisor);
    state[2] = norm - norm == 0.0 ? 1.0f : 0.0f;
}

extern "C" __global__ void sgd(const count *table, const count *pieces, const float *state, float lr, float momentum,
                               float decay, int nesterov) {
    STEP {
        float p = value[i], g = gradient[i] * factor + (row[6] ? decay : 0.0f) * p;
        if (first) {
            float b = momentum * first[i] + g;
            first[i] = b;
            g = nesterov ? g + momentum * b : b;
        }
        p -= lr * g;
        DONE;
    }
}

extern "C" __global__ void adamw(const count *table, const count *pieces, const float *state, float size, float root,
                                 float shrink, float eps, float b1, float c1, float b2, float c2) {
    STEP {
        float *second = (float *)row[3];
        float p = value[i], g = gradient[i] * factor;
        float m = b1 * first[i] + c1 * g, v = b2 * second[i] + c2 * g * g;
        first[i] = m;
        second[i] = v;
        p = p * (row[6] ? shrink : 1.0f) - size * m / (sqrtf(v) / root + eps);
        DONE;
    }
}

extern "C" __global__ void rmsprop(const count *table, const count *pieces, const float *state, float lr, float keep,
                                   float part, float eps, float momentum, float decay) {
    STEP {
        float *second = (float *)row[3];
        float p = value[i], g = gradient[i] * factor + (row[6] ? decay : 0.0f) * p;
        float square = keep * first[i] + part * g * g;
        first[i] = square;
        float step = g / (sqrtf(square) + eps);
        if (second) {
            step = momentum * second[i] + step;
            second[i] = step;
        }
        p -= lr * step;
        DONE;
    }
}

// After a step: the moving averages of the values, where the step was made.
extern "C" __global__ void moving_average(const count *table, const count *pieces, const float *state, float keep, float part) {
    if (state[2] == 0.0f) return;
    const count *row = table + pieces[2 * blockIdx.x] * ROW;
    const float *value = (const float *)row[0];
    float *average = (float *)row[7];
    count start = pieces[2 * blockIdx.x + 1], end = start + PIECE < row[5] ? start + PIECE : row[5];
    for (count i = start + threadIdx.x; i < end; i += BLOCK) average[i] = keep * average[i] + part * value[i];
}
