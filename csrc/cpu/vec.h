// Vectors of one instruction set, in a namespace of their own. The including file defines
// PSA_NAMESPACE and PSA_VECTOR_BYTES (and PSA_AVX512_BF16), and sets the compiler's target. No
// include guard: see all_kernels.h.
//
// Don't use templates or inline functions of std here: the linker keeps one copy for all
// instruction sets, possibly one that this CPU can't run.

namespace psa::cpu::PSA_NAMESPACE {

constexpr int64_t min(int64_t a, int64_t b) {
  return a < b ? a : b;
}
constexpr int64_t max(int64_t a, int64_t b) {
  return a < b ? b : a;
}
constexpr int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return max(low, min(x, high));
}

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The type in which elements of type T are summed.
template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using Acc = typename Accumulator<T>::type;

template <class A>
using Vec __attribute__((vector_size(PSA_VECTOR_BYTES))) = A;
template <class A>
constexpr int64_t kLanes = PSA_VECTOR_BYTES / sizeof(A);

constexpr int64_t kFloats = kLanes<float>;
using Floats = Vec<float>;
using Ints = Vec<int32_t>;
typedef uint32_t Words __attribute__((vector_size(PSA_VECTOR_BYTES)));
typedef uint16_t HalfWords __attribute__((vector_size(PSA_VECTOR_BYTES / 2)));

template <class V, class T>
inline V load_bits(const T* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof(V));
  return v;
}

template <class V, class T>
inline void store_bits(T* to, V v) {
  __builtin_memcpy(to, &v, sizeof(V));
}

template <class A>
inline Vec<A> splat(A a) {
  return a - Vec<A>{};
}

// Conversions of one element to and from the accumulator's type. Rounding is to nearest even.
inline float to_acc(float x) {
  return x;
}
inline double to_acc(double x) {
  return x;
}
inline float to_acc(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}
inline float to_acc(Half x) {
  // A half's exponent and mantissa, shifted into those of a float, give its value times 2^-112;
  // that holds for subnormal numbers too.
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  uint32_t bits = magnitude;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  f *= 0x1p112f;
  __builtin_memcpy(&bits, &f, 4);
  if (magnitude >= 0x7c00u << 13) bits = 0x7f800000u | magnitude;  // infinity and NaN
  bits |= uint32_t(x.bits & 0x8000) << 16;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

template <class T>
inline T from_acc(Acc<T> x) {
  return x;
}
template <>
inline BFloat16 from_acc<BFloat16>(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if (x != x) return {0x7fc0};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <>
inline Half from_acc<Half>(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  uint32_t magnitude = bits & 0x7fffffff;
  if (x != x) return {uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // 65520 and up: infinity
  if (magnitude < 0x38800000) {  // below 2^-14: adding 0.5 rounds to multiples of 2^-24
    float f;
    __builtin_memcpy(&f, &magnitude, 4);
    f += 0.5f;
    __builtin_memcpy(&magnitude, &f, 4);
    return {uint16_t(sign | (magnitude - 0x3f000000))};
  }
  magnitude += 0xfff + ((magnitude >> 13) & 1);
  return {uint16_t(sign | ((magnitude - (112u << 23)) >> 13))};
}

// Compilers emit several instructions for __builtin_convertvector; these intrinsics are one or two.
inline Words zero_extend(HalfWords v) {
#if PSA_VECTOR_BYTES == 64
  return (Words)_mm512_cvtepu16_epi32((__m256i)v);
#elif PSA_VECTOR_BYTES == 32
  return (Words)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, Words);
#endif
}
inline HalfWords truncate_words(Words v) {
#if PSA_VECTOR_BYTES == 64
  return (HalfWords)_mm512_cvtepi32_epi16((__m512i)v);
#elif PSA_VECTOR_BYTES == 32
  const __m256i lanes = _mm256_packus_epi32((__m256i)v, (__m256i)v);
  return (HalfWords)_mm256_castsi256_si128(_mm256_permute4x64_epi64(lanes, 0b1000));
#else
  return __builtin_convertvector(v, HalfWords);
#endif
}

// Loads and stores of kLanes<Acc<T>> elements, of any alignment.
inline Floats load(const float* from) {
  return load_bits<Floats>(from);
}
inline Vec<double> load(const double* from) {
  return load_bits<Vec<double>>(from);
}
inline Floats load(const BFloat16* from) {
  return (Floats)(zero_extend(load_bits<HalfWords>(from)) << 16);
}
inline Floats load(const Half* from) {
#if PSA_VECTOR_BYTES == 64
  return (Floats)_mm512_cvtph_ps(load_bits<__m256i>(from));
#elif PSA_VECTOR_BYTES == 32
  return (Floats)_mm256_cvtph_ps(load_bits<__m128i>(from));
#else
  Floats v;
  for (int64_t i = 0; i < kFloats; ++i) v[i] = to_acc(from[i]);
  return v;
#endif
}

inline void store(float* to, Floats v) {
  store_bits(to, v);
}
inline void store(double* to, Vec<double> v) {
  store_bits(to, v);
}
inline void store(BFloat16* to, Floats v) {
#ifdef PSA_AVX512_BF16
  const __m256bh narrowed = _mm512_cvtneps_pbh((__m512)v);
  __builtin_memcpy(to, &narrowed, sizeof(narrowed));
#else
  const Words bits = (Words)v;
  Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  rounded = v != v ? Words{} + 0x7fc0 : rounded;
  store_bits(to, truncate_words(rounded));
#endif
}
inline void store(Half* to, Floats v) {
#if PSA_VECTOR_BYTES == 64
  store_bits(to, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif PSA_VECTOR_BYTES == 32
  store_bits(to, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int64_t i = 0; i < kFloats; ++i) to[i] = from_acc<Half>(v[i]);
#endif
}

// The sum of a vector's lanes, by halving the vector.
#if PSA_VECTOR_BYTES >= 32
inline float sum_lanes(__m128 v) {
  v = _mm_add_ps(v, _mm_movehl_ps(v, v));
  return _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)));
}
inline float sum_lanes(__m256 v) {
  return sum_lanes(_mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)));
}
#endif
#if PSA_VECTOR_BYTES == 64
inline float sum_lanes(__m512 v) {
  const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
  return sum_lanes(_mm256_add_ps(_mm512_castps512_ps256(v), high));
}
#elif PSA_VECTOR_BYTES == 16
inline float sum_lanes(Floats v) {
  return (v[0] + v[2]) + (v[1] + v[3]);
}
#endif
inline double sum_lanes(Vec<double> v) {
  double sum = 0;
  for (int64_t i = 0; i < kLanes<double>; ++i) sum += v[i];
  return sum;
}

template <class A>
struct Bits;
template <>
struct Bits<float> {
  using type = int32_t;
};
template <>
struct Bits<double> {
  using type = int64_t;
};

// v with all but its last `count` lanes set to zero, even if they hold NaN.
template <class A>
inline Vec<A> last_lanes(Vec<A> v, int64_t count) {
  using I = typename Bits<A>::type;
  static constexpr auto mask = [] {
    struct {
      I lanes[2 * kLanes<A>];
    } table{};
    for (int64_t i = kLanes<A>; i < 2 * kLanes<A>; ++i) table.lanes[i] = -1;
    return table;
  }();
  return (Vec<A>)((Vec<I>)v & load_bits<Vec<I>>(mask.lanes + count));
}

// max(x, 0), but a NaN stays a NaN.
template <class V>
inline V relu(V x) {
  return x < 0 ? V{} : x;
}

// Results that no normal float can hold become 0 or infinity, so that the sigmoid saturates and its
// derivative is exactly 0.
inline Floats exp(Floats v) {
  const Floats x = v < -87.0f ? splat(-87.0f) : v > 88.0f ? splat(88.0f) : v;
  // x = n ln 2 + r with |r| <= ln 2 / 2. Adding 1.5 * 2^23 rounds to an integer.
  const Floats magic = x * 1.44269504f + 0x1.8p23f;
  const Floats n = magic - 0x1.8p23f;
  const Floats r = x - n * 0x1.62e4p-1f - n * 0x1.7f7d1cp-20f;
  // The Taylor series of exp(r); its next term is below 1e-8.
  Floats p = splat(1 / 5040.0f);
  p = p * r + 1 / 720.0f;
  p = p * r + 1 / 120.0f;
  p = p * r + 1 / 24.0f;
  p = p * r + 1 / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Floats y = p * (Floats)(((Ints)magic << 23) + 0x3f800000);
  return v < -87.0f ? Floats{} : v > 88.0f ? splat(__builtin_inff()) : y;
}
inline Vec<double> exp(Vec<double> x) {
  for (int64_t i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

template <class V>
inline V sigmoid(V x) {
  return 1 / (1 + exp(-x));
}

}  // namespace psa::cpu::PSA_NAMESPACE
