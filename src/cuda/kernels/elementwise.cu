extern "C" __global__ void relu(const real *x, real *y, count n) {
    count i = INDEX;
    if (i < n) {
        float v = load(x[i]);
        y[i] = v < 0.0f ? store(0.0f) : x[i];
    }
}
