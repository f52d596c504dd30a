// Losses, their gradients, and sums of both for the report.

// A block a sample: losses[sample], the gradient of the mean, and the logits added to `logits_sum`. The part `smoothing` of a label
// is spread over all classes; of the rest, where there are partners, `weight` is the label's and what is left its partner's.
extern "C" __global__ void cross_entropy(const real *logits, const int *labels, const int *partners, real *gradient,
                                         float *logits_sum, float *losses, int samples, int classes, float weight,
                                         float smoothing) {
    __shared__ float s[BLOCK];
    float number = 0.0f;
    for (int b = threadIdx.x; b < samples; b += BLOCK) number += labels[b] >= 0 ? 1.0f : 0.0f;
    number = block_sum(number, s);
    count row = (count)blockIdx.x * classes;
    int label = labels[blockIdx.x], partner = partners ? partners[blockIdx.x] : label;
    float top = __uint_as_float(0xff800000u);
    for (int j = threadIdx.x; j < classes; j += BLOCK) {
        float v = load(logits[row + j]);
        top = v > top ? v : top;
        if (logits_sum) logits_sum[row + j] += v;
        if (label < 0 && gradient) gradient[row + j] = store(0.0f);
    }
    if (label < 0) {
        if (threadIdx.x == 0) losses[blockIdx.x] = 0.0f;
        return;
    }
    __syncthreads();
    s[threadIdx.x] = top;
    for (int half = BLOCK / 2; half > 0; half /= 2) {
        __syncthreads();
        if ((int)threadIdx.x < half && s[threadIdx.x + half] > s[threadIdx.x]) s[threadIdx.x] = s[threadIdx.x + half];
    }
    __syncthreads();
    top = s[0];
    float sum = 0.0f, mean = 0.0f;
    for (int j = threadIdx.x; j < classes; j += BLOCK) sum += expf(load(logits[row + j]) - top);
    sum = block_sum(sum, s);
    if (smoothing > 0.0f) {
        for (int j = threadIdx.x; j < classes; j += BLOCK) mean += load(logits[row + j]) - top;
        mean = block_sum(mean, s) / (float)classes;
    }
    if (threadIdx.x == 0) {
        // A label beyond the classes must not pass for a loss.
        bool known = label < classes && partner >= 0 && partner < classes;
        float own = known ? load(logits[row + label]) : __uint_as_float(0x7fc00000u);
        float loss = logf(sum) + top - own;
        if (partners && known) loss = weight * loss + (1.0f - weight) * (logf(sum) + top - load(logits[row + partner]));
        if (smoothing > 0.0f) loss = (1.0f - smoothing) * loss + smoothing * (logf(sum) - mean);
        losses[blockIdx.x] = loss;
    }
    if (!gradient) return;
    float spread = smoothing / (float)classes, sharp = 1.0f - smoothing;
    for (int j = threadIdx.x; j < classes; j += BLOCK) {
        float p = expf(load(logits[row + j]) - top) / sum - spread;
        float target = (j == label ? weight : 0.0f) + (j == partner ? 1.0f - weight : 0.0f);
        gradient[row + j] = store((p - sharp * target) / number);
    }
}

// Grid: parts of a sample, samples. losses[sample][part]: sums of squared or absolute differences; the gradient of the mean.
// The target is `wide` if that is there. A thread takes `w` elements.
extern "C" __global__ void pixel_loss(const real *output, const real *target, const float *wide, const int *labels,
                                      real *gradient, float *losses, int samples, unsigned sample, int w, int absolute) {
    __shared__ float s[BLOCK];
    float number = 0.0f, loss = 0.0f, v[PACK], t[PACK];
    for (int b = threadIdx.x; b < samples; b += BLOCK) number += labels[b] >= 0 ? 1.0f : 0.0f;
    number = block_sum(number, s);
    bool counted = labels[blockIdx.y] >= 0;
    float scale = 1.0f / (number * (float)sample);
    count start = (count)blockIdx.y * sample;
    for (count i = INDEX * w; i < sample; i += (count)gridDim.x * BLOCK * w) {
        take(output + start + i, w, v);
        if (wide) take_floats(wide + start + i, w, t);
        else take(target + start + i, w, t);
        LANES {
            float d = v[k] - t[k];
            if (!counted) {
                v[k] = 0.0f;
            } else if (absolute) {
                loss += fabsf(d);
                v[k] = d == 0.0f ? 0.0f : d > 0.0f ? scale : d < 0.0f ? -scale : d;
            } else {
                loss += d * d;
                v[k] = 2.0f * d * scale;
            }
        }
        if (gradient) put(gradient + start + i, w, v);
    }
    loss = block_sum(loss, s);
    if (threadIdx.x == 0) losses[blockIdx.y * gridDim.x + blockIdx.x] = loss;
}

// One block. score[0] += the losses summed, times `scale`; score[1] += how many labels count: those that are not negative.
extern "C" __global__ void loss_total(const float *losses, int number, const int *labels, int samples, float scale, float *score) {
    __shared__ float s[BLOCK];
    float loss = 0.0f, counted = 0.0f;
    for (int j = threadIdx.x; j < number; j += BLOCK) loss += losses[j];
    for (int b = threadIdx.x; b < samples; b += BLOCK) counted += labels[b] >= 0 ? 1.0f : 0.0f;
    loss = block_sum(loss, s);
    counted = block_sum(counted, s);
    if (threadIdx.x == 0) {
        score[0] += loss * scale;
        score[1] += counted;
    }
}
