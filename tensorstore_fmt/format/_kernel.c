/* The hot loops of planes.py and statistics.py, in C11: optional, NumPy does the same without.

   Loops are written so that compilers vectorise them for any CPU: no intrinsics, no flags but
   -O3 and -fopenmp-simd (which needs no library). Python's limited API, so that one build serves
   all versions from 3.11. The GIL is released for what takes longer than getting it back.
   Memory is read from one end to the other: only then does a processor fetch ahead, which counts
   for more than the arithmetic.
   Sizes are checked here although the callers did: nothing a caller passes writes out of bounds. */

#define PY_SSIZE_T_CLEAN
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030B0000
#endif
#include <Python.h>

#include <fenv.h>
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "words are read as they lie; NumPy serves big-endian machines"
#endif

#define VERSION 1                 /* kernel.py asks for this one */
#define BLOCK 8192                /* bytes: a block and its scratch stay in a first-level cache */
#define GIL_NBYTES (32 * 1024)    /* less takes a few microseconds: keep the GIL */

/* Not Py_RETURN_NONE: the headers of 3.12 and later take None for immortal and add no reference,
   whatever Py_LIMITED_API says, but one build also serves 3.11, where None can run out of them. */
static PyObject *none(void) {
    Py_IncRef(Py_None);
    return Py_None;
}

/* Compiled twice where that can be; the processor chooses when the module is loaded. (Sanitizers
   are not ready that early.) */
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GLIBC__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__clang__)
#define FAST __attribute__((target_clones("avx2", "default")))
#else
#define FAST
#endif

typedef const uint8_t *restrict in_t;
typedef uint8_t *restrict out_t;

/* --- planes ---------------------------------------------------------------------- */

/* In place too: every word depends on itself alone. */
#define ROTATE(BITS)                                                                        \
    FAST static void rotate##BITS(uint8_t *to, const uint8_t *from, size_t n, int left) {   \
        _Pragma("omp simd")                                                                 \
        for (size_t i = 0; i < n; i++) {                                                    \
            uint##BITS##_t x;                                                               \
            memcpy(&x, from + i * sizeof x, sizeof x);                                      \
            x = (uint##BITS##_t)((uint##BITS##_t)(x << left) | x >> (BITS - left));         \
            memcpy(to + i * sizeof x, &x, sizeof x);                                        \
        }                                                                                   \
    }
ROTATE(8)
ROTATE(16)
ROTATE(32)
ROTATE(64)

static void rotate(uint8_t *to, const uint8_t *from, size_t n, int w, int left) {
    switch (w) {
    case 1: rotate8(to, from, n, left); break;
    case 2: rotate16(to, from, n, left); break;
    case 4: rotate32(to, from, n, left); break;
    default: rotate64(to, from, n, left);
    }
}

static void split2(in_t x, size_t n, out_t a, out_t b) {
    for (size_t i = 0; i < n; i++) {
        a[i] = x[2 * i];
        b[i] = x[2 * i + 1];
    }
}

static void split4(in_t x, size_t n, out_t a, out_t b, out_t c, out_t d) {
    for (size_t i = 0; i < n; i++) {
        a[i] = x[4 * i];
        b[i] = x[4 * i + 1];
        c[i] = x[4 * i + 2];
        d[i] = x[4 * i + 3];
    }
}

static void join2(out_t x, size_t n, in_t a, in_t b) {
    for (size_t i = 0; i < n; i++) {
        x[2 * i] = a[i];
        x[2 * i + 1] = b[i];
    }
}

static void join4(out_t x, size_t n, in_t a, in_t b, in_t c, in_t d) {
    for (size_t i = 0; i < n; i++) {
        x[4 * i] = a[i];
        x[4 * i + 1] = b[i];
        x[4 * i + 2] = c[i];
        x[4 * i + 3] = d[i];
    }
}

FAST static void split_words(const uint8_t *raw, size_t n, uint8_t *const *planes, int w, int rotated) {
    uint8_t turned[BLOCK], halves[BLOCK];
    const size_t step = BLOCK / (size_t)w;
    for (size_t at = 0; at < n; at += step) {
        const size_t m = n - at < step ? n - at : step;
        const uint8_t *block = raw + at * (size_t)w;
        uint8_t *p[8];
        for (int i = 0; i < w; i++) p[i] = planes[i] + at;
        if (rotated) {
            rotate(turned, block, m, w, 1);
            block = turned;
        }
        switch (w) {
        case 1: memcpy(p[0], block, m); break;
        case 2: split2(block, m, p[0], p[1]); break;
        case 4: split4(block, m, p[0], p[1], p[2], p[3]); break;
        default: /* even and odd bytes first: eight at once are too many for the registers */
            split2(block, 4 * m, halves, halves + BLOCK / 2);
            split4(halves, m, p[0], p[2], p[4], p[6]);
            split4(halves + BLOCK / 2, m, p[1], p[3], p[5], p[7]);
        }
    }
}

/* A plane of one byte stands for n of them. */
FAST static void join_words(uint8_t *const *planes, const int *is_single, uint8_t *out, size_t n,
                            int w, int rotated) {
    uint8_t repeated[BLOCK], halves[BLOCK];
    const size_t step = BLOCK / (size_t)w;
    const uint8_t *p[8];
    for (int i = 0; i < w; i++) {
        p[i] = is_single[i] ? repeated + (size_t)i * step : planes[i];
        if (is_single[i]) memset(repeated + (size_t)i * step, planes[i][0], step);
    }
    for (size_t at = 0; at < n; at += step) {
        const size_t m = n - at < step ? n - at : step;
        uint8_t *block = out + at * (size_t)w;
        switch (w) {
        case 1: memcpy(block, p[0], m); break;
        case 2: join2(block, m, p[0], p[1]); break;
        case 4: join4(block, m, p[0], p[1], p[2], p[3]); break;
        default:
            join4(halves, m, p[0], p[2], p[4], p[6]);
            join4(halves + BLOCK / 2, m, p[1], p[3], p[5], p[7]);
            join2(block, 4 * m, halves, halves + BLOCK / 2);
        }
        if (rotated) rotate(block, block, m, w, 8 * w - 1);
        for (int i = 0; i < w; i++) p[i] += is_single[i] ? 0 : m;
    }
}

/* --- statistics --------------------------------------------------------------------- */

enum { COUNT, NAN_, POSINF, NEGINF, ZERO, MIN, MAX, SUM, SUMSQ, SUMABS, NSTATS };

#define ELEMENTS 2048  /* a block that needs a second look is still in the first-level cache */
#define SCALE 0x1p-540 /* half the exponent range: neither sums nor squares overflow */

typedef struct {
    double *stats;
    double big[3]; /* sums too large for stats, times SCALE (squares: twice) */
} total_t;

static void add_big(total_t *t, double sum, double squares, double absolutes) {
    t->big[0] += sum;
    t->big[1] += squares;
    t->big[2] += absolutes;
}

static void add_sums(total_t *t, double sum, double squares, double absolutes) {
    double *s = t->stats + SUM;
    if (isfinite(s[1] + squares) && isfinite(s[2] + absolutes)) {
        s[0] += sum;
        s[1] += squares;
        s[2] += absolutes;
    } else {
        add_big(t, sum * SCALE, squares * SCALE * SCALE, absolutes * SCALE);
    }
}

static void begin(total_t *t, double *stats, size_t n) {
    *t = (total_t){stats, {0, 0, 0}};
    memset(stats, 0, NSTATS * sizeof *stats);
    stats[COUNT] = (double)n;
    stats[MIN] = INFINITY;
    stats[MAX] = -INFINITY;
}

static void end(total_t *t) {
    double *s = t->stats;
    if (t->big[1] != 0) {
        s[SUM] = (s[SUM] * SCALE + t->big[0]) / SCALE;
        s[SUMSQ] = (s[SUMSQ] * SCALE * SCALE + t->big[1]) / SCALE / SCALE;
        s[SUMABS] = (s[SUMABS] * SCALE + t->big[2]) / SCALE;
    }
    if (s[COUNT] == s[NAN_]) s[MIN] = s[MAX] = NAN;
    for (int i = MIN; i <= SUM; i++) s[i] += 0.0; /* -0 becomes 0 */
}

static void note_extremes(total_t *t, double low, double high, double zero) {
    t->stats[ZERO] += zero;
    if (low < t->stats[MIN]) t->stats[MIN] = low;
    if (high > t->stats[MAX]) t->stats[MAX] = high;
}

/* Add what is finite and count the rest; if a sum overflows, scaled down. */
FAST static void add_odd(const double *restrict p, size_t n, total_t *t, double scale) {
    double sum = 0, squares = 0, absolutes = 0, nan = 0, posinf = 0, neginf = 0;
    const double one = 1, top = DBL_MAX;
    #pragma omp simd reduction(+ : sum, squares, absolutes, nan, posinf, neginf)
    for (size_t i = 0; i < n; i++) {
        const double x = p[i];
        const double d = (x <= top && x >= -top ? x : 0) * scale;
        nan += x != x ? one : 0;
        posinf += x > top ? one : 0;
        neginf += x < -top ? one : 0;
        sum += d;
        squares += d * d;
        absolutes += fabs(d);
    }
    if (!isfinite(squares) || !isfinite(absolutes)) {
        add_odd(p, n, t, SCALE);
        return;
    }
    t->stats[NAN_] += nan;
    t->stats[POSINF] += posinf;
    t->stats[NEGINF] += neginf;
    if (scale == 1)
        add_sums(t, sum, squares, absolutes);
    else
        add_big(t, sum, squares, absolutes);
}

FAST static void add_doubles(const double *restrict p, size_t n, total_t *t) {
    double sum = 0, squares = 0, absolutes = 0, low = INFINITY, high = -INFINITY, zero = 0;
    const double one = 1;
    #pragma omp simd reduction(+ : sum, squares, absolutes, zero) reduction(min : low) \
                     reduction(max : high)
    for (size_t i = 0; i < n; i++) {
        const double x = p[i]; /* comparisons with NaN are false and leave these alone */
        low = x < low ? x : low;
        high = x > high ? x : high;
        zero += x == 0 ? one : 0;
        sum += x;
        squares += x * x;
        absolutes += fabs(x);
    }
    note_extremes(t, low, high, zero);
    if (isfinite(squares) && isfinite(absolutes))
        add_sums(t, sum, squares, absolutes);
    else
        add_odd(p, n, t, 1);
}

#define LANES 8 /* of a vector; more do not fit the registers */
#define GROUP (8 * LANES)

/* Eight floats are added as floats, which keeps the error below 2^-21, their sums as doubles. */
FAST static void add_floats(const float *restrict p, size_t n, total_t *t) {
    double sums[3][LANES] = {{0}}, sum = 0, squares = 0, absolutes = 0, zeros = 0;
    float low[LANES], high[LANES], zero[LANES] = {0};
    const size_t whole = n - n % GROUP;
    for (int i = 0; i < LANES; i++) {
        low[i] = INFINITY;
        high[i] = -INFINITY;
    }
    for (const float *group = p; group < p + whole; group += GROUP) {
        float s[LANES] = {0}, q[LANES] = {0}, a[LANES] = {0};
        for (const float *row = group; row < group + GROUP; row += LANES) {
            #pragma omp simd
            for (int i = 0; i < LANES; i++) {
                const float x = row[i];
                low[i] = x < low[i] ? x : low[i];
                high[i] = x > high[i] ? x : high[i];
                zero[i] += x == 0 ? 1.0f : 0.0f;
                s[i] += x;
                q[i] += x * x;
                a[i] += fabsf(x);
            }
        }
        #pragma omp simd
        for (int i = 0; i < LANES; i++) {
            sums[0][i] += (double)s[i];
            sums[1][i] += (double)q[i];
            sums[2][i] += (double)a[i];
        }
    }
    for (int i = 0; i < LANES; i++) {
        note_extremes(t, low[i], high[i], zero[i]);
        sum += sums[0][i];
        squares += sums[1][i];
        absolutes += sums[2][i];
        zeros += (double)zero[i];
    }
    /* Not if float was too narrow for a sum, or squares may have been lost to underflow. */
    const int is_exact = squares > (double)n * 0x1p-128 || zeros == (double)whole;
    double wide[ELEMENTS];
    if (is_exact && isfinite(squares) && isfinite(absolutes)) {
        add_sums(t, sum, squares, absolutes);
    } else {
        for (size_t i = 0; i < whole; i++) wide[i] = (double)p[i];
        add_odd(wide, whole, t, 1);
    }
    for (size_t i = whole; i < n; i++) wide[i - whole] = (double)p[i];
    add_doubles(wide, n - whole, t);
}

/* One byte an element, whatever the dtype: count the bytes, then look up what they stand for. */
static void of_bytes(const uint8_t *p, size_t n, const double *values, double *stats) {
    total_t t;
    size_t counts[4][256] = {{0}}; /* four, so that equal neighbours do not wait for each other */
    size_t i = 0;
    begin(&t, stats, n);
    for (; i + 4 <= n; i += 4)
        for (int k = 0; k < 4; k++) counts[k][p[i + (size_t)k]]++;
    for (; i < n; i++) counts[0][p[i]]++;
    for (int b = 0; b < 256; b++) {
        const double m = (double)(counts[0][b] + counts[1][b] + counts[2][b] + counts[3][b]);
        const double x = values[b];
        if (m == 0) continue;
        if (x < stats[MIN]) stats[MIN] = x;
        if (x > stats[MAX]) stats[MAX] = x;
        if (isfinite(x)) {
            stats[ZERO] += x == 0 ? m : 0;
            add_sums(&t, m * x, m * x * x, m * fabs(x));
        } else {
            stats[isnan(x) ? NAN_ : x > 0 ? POSINF : NEGINF] += m;
        }
    }
    end(&t);
}

static inline float from_bf16(uint16_t h) {
    const uint32_t bits = (uint32_t)h << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline float from_f16(uint16_t h) {
    /* The bits at their places, then the exponent mended, but of infinity and NaN. */
    uint32_t bits = (uint32_t)(h & 0x7FFF) << 13;
    float x;
    memcpy(&x, &bits, sizeof x);
    x *= 0x1p112f;
    memcpy(&bits, &x, sizeof x);
    bits |= (uint32_t)(h & 0x8000) << 16 | (uint32_t)((h & 0x7C00) == 0x7C00) * 0x7F800000u;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* What words of more than one byte are: a letter as in the module struct (E is bfloat16), their
   type, the type they are added in, where all have a place (but integers of 64 bits, which are
   rounded), and how they become that. */
#define KINDS(X)                                                                            \
    X(f, float, float, )                                                                    \
    X(d, double, double, )                                                                  \
    X(e, uint16_t, float, from_f16)                                                         \
    X(E, uint16_t, float, from_bf16)                                                        \
    X(h, int16_t, float, )                                                                  \
    X(H, uint16_t, float, )                                                                 \
    X(i, int32_t, double, )                                                                 \
    X(I, uint32_t, double, )                                                                \
    X(q, int64_t, double, )                                                                 \
    X(Q, uint64_t, double, )

#define ADD(LETTER, FROM, TO, HOW)                                                          \
    FAST static void add_##LETTER(const uint8_t *p, size_t n, total_t *t) {                 \
        TO wide[ELEMENTS];                                                                  \
        if ((#LETTER[0] == 'f' || #LETTER[0] == 'd') && (uintptr_t)p % sizeof(TO) == 0) {   \
            add_##TO##s((const TO *)(const void *)p, n, t);                                 \
            return;                                                                         \
        }                                                                                   \
        for (size_t i = 0; i < n; i++) {                                                    \
            FROM x;                                                                         \
            memcpy(&x, p + i * sizeof x, sizeof x);                                         \
            wide[i] = (TO)HOW(x);                                                           \
        }                                                                                   \
        add_##TO##s(wide, n, t);                                                            \
    }
KINDS(ADD)

typedef void (*add_t)(const uint8_t *, size_t, total_t *);

static void of_words(const uint8_t *p, size_t n, size_t size, add_t add, double *stats) {
    total_t t;
    begin(&t, stats, n);
    for (size_t at = 0; at < n; at += ELEMENTS)
        add(p + at * size, n - at < ELEMENTS ? n - at : ELEMENTS, &t);
    end(&t);
}

/* --- Python ---------------------------------------------------------------------------- */

static PyObject *refuse(const char *what) {
    PyErr_SetString(PyExc_ValueError, what);
    return NULL;
}

static void release(Py_buffer *views, int n) {
    while (n > 0) PyBuffer_Release(&views[--n]);
}

/* Take the buffers of a sequence of 1, 2, 4 or 8 planes; give their number, or 0. */
static int take_planes(PyObject *planes, Py_buffer *views, int flags) {
    const Py_ssize_t w = PySequence_Size(planes);
    if (w != 1 && w != 2 && w != 4 && w != 8) {
        if (!PyErr_Occurred()) refuse("there must be 1, 2, 4 or 8 planes");
        return 0;
    }
    for (int i = 0; i < w; i++) {
        PyObject *plane = PySequence_GetItem(planes, i);
        const int failed = plane == NULL || PyObject_GetBuffer(plane, &views[i], flags) < 0;
        Py_XDECREF(plane);
        if (failed) {
            release(views, i);
            return 0;
        }
    }
    return (int)w;
}

static PyObject *split_or_join(Py_buffer words, PyObject *cut, int rotated, int joins) {
    Py_buffer views[8];
    uint8_t *planes[8];
    int is_single[8];
    const int w = take_planes(cut, views, joins ? PyBUF_SIMPLE : PyBUF_WRITABLE);
    const Py_ssize_t n = w > 0 ? words.len / w : 0;
    int fits = w > 0 && n * w == words.len;
    for (int i = 0; i < w; i++) {
        planes[i] = views[i].buf;
        is_single[i] = joins && views[i].len == 1;
        fits = fits && (views[i].len == n || is_single[i]);
    }
    if (fits) {
        PyThreadState *state = words.len > GIL_NBYTES ? PyEval_SaveThread() : NULL;
        if (joins)
            join_words(planes, is_single, words.buf, (size_t)n, w, rotated);
        else
            split_words(words.buf, (size_t)n, planes, w, rotated);
        if (state != NULL) PyEval_RestoreThread(state);
    }
    release(views, w);
    PyBuffer_Release(&words);
    if (w == 0) return NULL;
    return fits ? none() : refuse("planes must hold one byte of each word");
}

static PyObject *py_split(PyObject *Py_UNUSED(module), PyObject *args) {
    Py_buffer words;
    PyObject *cut;
    int rotated;
    if (!PyArg_ParseTuple(args, "y*Op:split", &words, &cut, &rotated)) return NULL;
    return split_or_join(words, cut, rotated, 0);
}

static PyObject *py_join(PyObject *Py_UNUSED(module), PyObject *args) {
    Py_buffer words;
    PyObject *cut;
    int rotated;
    if (!PyArg_ParseTuple(args, "Ow*p:join", &cut, &words, &rotated)) return NULL;
    return split_or_join(words, cut, rotated, 1);
}

#define ROW(LETTER, FROM, TO, HOW) {#LETTER[0], sizeof(FROM), add_##LETTER},
static const struct {
    char letter;
    uint8_t size;
    add_t add;
} TABLE[] = {{'B', 1, NULL}, KINDS(ROW)};

static int add_rows(Py_buffer data, int kind, Py_buffer values, Py_buffer out) {
    size_t k = 0;
    while (k < sizeof TABLE / sizeof TABLE[0] && TABLE[k].letter != kind) k++;
    if (k == sizeof TABLE / sizeof TABLE[0]) return 0;
    const Py_ssize_t vector = NSTATS * (Py_ssize_t)sizeof(double), size = TABLE[k].size;
    const Py_ssize_t rows = out.len / vector, row = rows > 0 ? data.len / rows : 0;
    if (out.len % vector != 0 || data.len != rows * row || row % size != 0 ||
        (TABLE[k].add == NULL && values.len != 256 * (Py_ssize_t)sizeof(double)) ||
        ((uintptr_t)out.buf | (uintptr_t)values.buf) % sizeof(double) != 0)
        return 0;
    PyThreadState *state = data.len > GIL_NBYTES ? PyEval_SaveThread() : NULL;
    fenv_t before;
    fegetenv(&before); /* a training loop may flush denormal numbers to zero: we do not */
    fesetenv(FE_DFL_ENV);
    for (Py_ssize_t r = 0; r < rows; r++) {
        const uint8_t *from = (const uint8_t *)data.buf + r * row;
        double *to = (double *)out.buf + r * NSTATS;
        if (TABLE[k].add == NULL)
            of_bytes(from, (size_t)row, values.buf, to);
        else
            of_words(from, (size_t)(row / size), (size_t)size, TABLE[k].add, to);
    }
    fesetenv(&before);
    if (state != NULL) PyEval_RestoreThread(state);
    return 1;
}

static PyObject *py_statistics(PyObject *Py_UNUSED(module), PyObject *args) {
    Py_buffer data, values, out;
    int kind;
    if (!PyArg_ParseTuple(args, "y*Cy*w*:statistics", &data, &kind, &values, &out)) return NULL;
    const int fits = add_rows(data, kind, values, out);
    PyBuffer_Release(&data);
    PyBuffer_Release(&values);
    PyBuffer_Release(&out);
    return fits ? none() : refuse("kind, data, values and out do not fit each other");
}

static PyMethodDef METHODS[] = {
    {"split", py_split, METH_VARARGS,
     "split(raw, planes, rotated)\n--\n\nWrite byte i of every word to plane i."},
    {"join", py_join, METH_VARARGS, "join(planes, out, rotated)\n--\n\nUndo split."},
    {"statistics", py_statistics, METH_VARARGS,
     "statistics(data, kind, values, out)\n--\n\nWrite ten numbers for each row."},
    {NULL, NULL, 0, NULL},
};

static int fill(PyObject *module) {
#ifdef __clang__
    const char *compiler = __VERSION__;
#else
    const char *compiler = "gcc " __VERSION__;
#endif
    if (PyModule_AddIntConstant(module, "VERSION", VERSION) < 0) return -1;
    return PyModule_AddStringConstant(module, "COMPILER", compiler);
}

static PyModuleDef_Slot SLOTS[] = {{Py_mod_exec, (void *)fill}, {0, NULL}};

static struct PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_kernel",
    .m_doc = "Hot loops of planes and statistics.",
    .m_methods = METHODS,
    .m_slots = SLOTS,
};

PyMODINIT_FUNC PyInit__kernel(void) { return PyModuleDef_Init(&MODULE); }
