// Gradients of linear and logistic regression, client by client, each row read from memory once:
//
//     eta = <x, w>,   r = s(eta) - y  or  (eta - y) / sigma^2,   g += r x,
//
// for a block of rows while it is in the first cache. Compiled by targets/fused.py; a plain C interface, called by ctypes.
// Sums run in an order that the number of features and rows fixes: threads divide the clients, never a client's rows.

#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
    static constexpr int width = 16, bits = 23, bias = 127, degree = 7;
    typedef float Vector __attribute__((vector_size(64)));
    typedef int32_t Integers __attribute__((vector_size(64)));
    static constexpr float low = -87.0f, high = 88.0f, magic = 12582912.0f;  // 1.5 * 2^23
    static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
};
template <>
struct Lanes<double> {
    static constexpr int width = 8, bits = 52, bias = 1023, degree = 13;
    typedef double Vector __attribute__((vector_size(64)));
    typedef int64_t Integers __attribute__((vector_size(64)));
    static constexpr double low = -708.0, high = 709.0, magic = 6755399441055744.0;  // 1.5 * 2^52
    static constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
};

template <class T>
static inline typename Lanes<T>::Vector load(const T* from) {
    typename Lanes<T>::Vector vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

// Halves are added onto each other until one lane is left.
template <class T, int half>
static inline void halve(T* terms) {
    for (int i = 0; i < half; i++) terms[i] += terms[i + half];
    if constexpr (half > 1) halve<T, half / 2>(terms);
}

template <class T>
static inline T total(typename Lanes<T>::Vector vector) {
    T terms[Lanes<T>::width];
    std::memcpy(terms, &vector, sizeof vector);
    halve<T, Lanes<T>::width / 2>(terms);
    return terms[0];
}

// exp by reduction to |r| <= ln(2) / 2 and Taylor's polynomial, whose remainder is below the last place; NaN stays NaN.
template <class T>
static inline typename Lanes<T>::Vector exponential(typename Lanes<T>::Vector x) {
    typedef Lanes<T> L;
    typedef typename L::Vector V;
    const V low = V{} + L::low, high = V{} + L::high;
    x = x < low ? low : x;
    x = x > high ? high : x;
    const V shifted = x * T(1.44269504088896340736) + L::magic;
    const V whole = shifted - L::magic;
    const V rest = (x - whole * L::ln2_high) - whole * L::ln2_low;
    T inverse[L::degree + 1];
    inverse[0] = 1;
    for (int i = 1; i <= L::degree; i++) inverse[i] = inverse[i - 1] / T(i);
    V sum = V{} + inverse[L::degree];
    for (int i = L::degree - 1; i >= 0; i--) sum = sum * rest + inverse[i];
    typename L::Integers power = __builtin_convertvector(whole, typename L::Integers);
    power = (power + L::bias) << L::bits;
    V scale;
    std::memcpy(&scale, &power, sizeof scale);
    return sum * scale;
}

// The last features of a row, which do not fill a vector: read with the ones before them, which `keep` sets to zero,
// or, in a row shorter than a vector, copied.
template <class T>
static inline typename Lanes<T>::Vector tail(const T* row, int64_t q, const typename Lanes<T>::Vector& keep) {
    constexpr int W = Lanes<T>::width;
    if (q >= W) return load(row + q - W) * keep;
    typename Lanes<T>::Vector vector{};
    std::memcpy(&vector, row, size_t(q) * sizeof(T));
    return vector;
}

template <class T, int rows>
static inline void block(const T* x, const T* y, const T* w, T* g, int64_t q, typename Lanes<T>::Vector last_w,
                         const typename Lanes<T>::Vector& keep, bool logistic, T weight, T* residuals) {
    typedef typename Lanes<T>::Vector V;
    constexpr int W = Lanes<T>::width;
    const int64_t whole = q / W;
    V sums[rows];
    for (int b = 0; b < rows; b++) sums[b] = V{};
    for (int64_t j = 0; j < whole; j++) {
        const V wj = load(w + j * W);
        for (int b = 0; b < rows; b++) sums[b] += wj * load(x + b * q + j * W);
    }
    if (q % W)
        for (int b = 0; b < rows; b++) sums[b] += last_w * tail<T>(x + b * q, q, keep);
    V eta{};
    for (int b = 0; b < rows; b++) eta[b] = total<T>(sums[b]);
    V target{};
    std::memcpy(&target, y, rows * sizeof(T));
    const V one = V{} + T(1);
    const V r = logistic ? one / (one + exponential<T>(-eta)) - target : (eta - target) * weight;
    std::memcpy(residuals, &r, rows * sizeof(T));
    for (int64_t j = 0; j < whole; j++) {
        V gj = load(g + j * W);
        for (int b = 0; b < rows; b++) gj += residuals[b] * load(x + b * q + j * W);
        std::memcpy(g + j * W, &gj, sizeof gj);
    }
    if (q % W) {
        V gj = load(g + whole * W);
        for (int b = 0; b < rows; b++) gj += residuals[b] * tail<T>(x + b * q, q, keep);
        std::memcpy(g + whole * W, &gj, sizeof gj);
    }
}

// One client at one point: x (rows, q), y (rows), w (q) -> out (q); g holds q entries, rounded up to whole vectors.
template <class T>
static void client(const T* x, const T* y, const T* w, T* out, T* g, int64_t rows, int64_t q, bool logistic, T weight) {
    typedef typename Lanes<T>::Vector V;
    constexpr int W = Lanes<T>::width, B = 8;
    const int64_t whole = q / W, rest = q % W;
    V keep{};
    for (int64_t i = W - rest; i < W; i++) keep[i] = 1;
    const V last_w = tail<T>(w, q, keep);
    std::memset(g, 0, size_t(whole + 1) * sizeof(V));
    T residuals[B];
    int64_t r = 0;
    for (; r + B <= rows; r += B) block<T, B>(x + r * q, y + r, w, g, q, last_w, keep, logistic, weight, residuals);
    for (; r < rows; r++) block<T, 1>(x + r * q, y + r, w, g, q, last_w, keep, logistic, weight, residuals);
    std::memcpy(out, g, size_t(whole * W) * sizeof(T));
    const int64_t skip = q >= W ? W - rest : 0;  // where the last features stand in their vector
    if (rest) std::memcpy(out + whole * W, g + whole * W + skip, size_t(rest) * sizeof(T));
}

// out (m, chains, q): gradients of the m clients `who` at w (chains, q), divided among threads.
template <class T>
static void gradients(const T* x, const T* y, const T* w, T* out, const int64_t* offsets, const int64_t* who, int64_t m,
                      int64_t chains, int64_t q, int logistic, double weight, int64_t threads) {
    auto some = [=](int64_t first, int64_t last) {
        std::vector<T> g(size_t(q + 2 * Lanes<T>::width));
        for (int64_t i = first; i < last; i++) {
            const int64_t at = offsets[who[i]], rows = offsets[who[i] + 1] - at;
            for (int64_t c = 0; c < chains; c++)
                client<T>(x + at * q, y + at, w + c * q, out + (i * chains + c) * q, g.data(), rows, q, logistic != 0,
                          T(weight));
        }
    };
    std::vector<std::thread> others;
    for (int64_t t = 1; t < threads; t++) others.emplace_back(some, m * t / threads, m * (t + 1) / threads);
    some(0, m / threads);
    for (auto& other : others) other.join();
}

extern "C" void gradients_float32(const float* x, const float* y, const float* w, float* out, const int64_t* offsets,
                                  const int64_t* who, int64_t m, int64_t chains, int64_t q, int logistic, double weight,
                                  int64_t threads) {
    gradients<float>(x, y, w, out, offsets, who, m, chains, q, logistic, weight, threads);
}

extern "C" void gradients_float64(const double* x, const double* y, const double* w, double* out,
                                  const int64_t* offsets, const int64_t* who, int64_t m, int64_t chains, int64_t q,
                                  int logistic, double weight, int64_t threads) {
    gradients<double>(x, y, w, out, offsets, who, m, chains, q, logistic, weight, threads);
}
