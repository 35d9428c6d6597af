/* Scaling pictures down by averaging areas, in whole numbers: the same bytes on every processor.
 *
 * A target pixel is the mean of the source area that it covers. Along each axis the weights of the source pixels are
 * the overlaps, in units of 2^-15, rounded so that they sum to one exactly. First all rows under a target row are
 * averaged, with eight bits behind the point, then the columns; both roundings are to nearest. shards/area.py says the
 * same in numpy, and a test holds the two together.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define WIDE __attribute__((target_clones("avx2", "default")))
#else
#define WIDE
#endif

enum { AT_ONCE = 64 };

typedef uint16_t four16 __attribute__((vector_size(8)));
typedef uint32_t four32 __attribute__((vector_size(16)));

/* One axis: `taps` weights for each target pixel, from source pixel first[i] on. */
typedef struct {
    int taps;
    int32_t *first;
    uint16_t *weight;
} Axis;

static int axis_of(Axis *axis, int64_t from, int64_t to) {
    axis->taps = (int)((from + to - 1) / to) + 1;
    axis->first = malloc(sizeof(int32_t) * (size_t)to);
    axis->weight = malloc(sizeof(uint16_t) * (size_t)to * (size_t)axis->taps);
    if (!axis->first || !axis->weight) return 0;
    /* Both grids are measured in 1 / (from * to) of the axis, so that all overlaps are whole numbers. */
    for (int64_t i = 0; i < to; i++) {
        int64_t begin = i * from, end = begin + from, source = begin / to, given = 0;
        axis->first[i] = (int32_t)source;
        for (int k = 0; k < axis->taps; k++, source++) {
            int64_t right = (source + 1) * to < end ? (source + 1) * to : end;
            int64_t until = right > begin ? ((right - begin) * 65536 + from) / (2 * from) : 0;
            uint16_t weight = source * to < end ? (uint16_t)(until - given) : 0;
            axis->weight[i * axis->taps + k] = weight;
            given += weight;
        }
    }
    return 1;
}

static void axis_free(Axis *axis) {
    free(axis->first);
    free(axis->weight);
}

/* The weighted sum of `taps` rows, in 2^-8; `n` values, of which AT_ONCE are kept in registers. */
WIDE static void rows(const uint8_t *restrict in, int64_t stride, const uint16_t *weight, int taps, int64_t n,
                      uint16_t *restrict out) {
    for (int64_t x = 0; x < n; x += AT_ONCE) {
        uint32_t sum[AT_ONCE];
        for (int i = 0; i < AT_ONCE; i++) sum[i] = 64;
        if (n - x >= AT_ONCE) {
            for (int k = 0; k < taps; k++) {
                const uint8_t *row = in + k * stride + x;
                const uint32_t w = weight[k];
                if (w) /* a row without weight may lie below the picture */
                    for (int i = 0; i < AT_ONCE; i++) sum[i] += w * row[i];
            }
            for (int i = 0; i < AT_ONCE; i++) out[x + i] = (uint16_t)(sum[i] >> 7);
        } else {
            int rest = (int)(n - x);
            for (int k = 0; k < taps; k++) {
                const uint8_t *row = in + k * stride + x;
                const uint32_t w = weight[k];
                if (w)
                    for (int i = 0; i < rest; i++) sum[i] += w * row[i];
            }
            for (int i = 0; i < rest; i++) out[x + i] = (uint16_t)(sum[i] >> 7);
        }
    }
}

/* The weighted sum of columns, of three channels. Four values are read where three count: `in` is longer by that. */
WIDE static void columns3(const uint16_t *in, const Axis *axis, int64_t n, uint8_t *out) {
    for (int64_t x = 0; x < n; x++) {
        four32 sum = {1u << 22, 1u << 22, 1u << 22, 1u << 22};
        const uint16_t *from = in + (int64_t)axis->first[x] * 3, *weight = axis->weight + x * axis->taps;
        for (int k = 0; k < axis->taps; k++) {
            four16 here;
            memcpy(&here, from + 3 * k, sizeof here);
            sum += __builtin_convertvector(here, four32) * (uint32_t)weight[k];
        }
        sum >>= 23;
        out[3 * x] = (uint8_t)sum[0];
        out[3 * x + 1] = (uint8_t)sum[1];
        out[3 * x + 2] = (uint8_t)sum[2];
    }
}

static void columns1(const uint16_t *in, const Axis *axis, int64_t n, uint8_t *out) {
    for (int64_t x = 0; x < n; x++) {
        uint32_t sum = 1u << 22;
        const uint16_t *from = in + axis->first[x], *weight = axis->weight + x * axis->taps;
        for (int k = 0; k < axis->taps; k++) sum += (uint32_t)weight[k] * from[k];
        out[x] = (uint8_t)(sum >> 23);
    }
}

static int shrunk(const uint8_t *in, int64_t height, int64_t width, int64_t channels, uint8_t *out, int64_t new_height,
                  int64_t new_width) {
    Axis down = {0}, across = {0};
    uint16_t *row = NULL;
    int whole = axis_of(&down, height, new_height) && axis_of(&across, width, new_width);
    if (whole) row = calloc((size_t)(width * channels + 4 * across.taps + 4), sizeof(uint16_t));
    whole = whole && row;
    for (int64_t y = 0; whole && y < new_height; y++) {
        int64_t stride = width * channels;
        rows(in + down.first[y] * stride, stride, down.weight + y * down.taps, down.taps, stride, row);
        (channels == 3 ? columns3 : columns1)(row, &across, new_width, out + y * new_width * channels);
    }
    free(row);
    axis_free(&down);
    axis_free(&across);
    return whole;
}

static PyObject *shrink(PyObject *module, PyObject *arguments) {
    Py_buffer in, out;
    Py_ssize_t height, width, channels, new_height, new_width;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "y*w*nnnnn", &in, &out, &height, &width, &channels, &new_height, &new_width))
        return NULL;
    int fits = (channels == 1 || channels == 3) && 0 < new_height && new_height <= height && 0 < new_width &&
               new_width <= width && height < 1 << 30 && width < 1 << 30 && in.len == height * width * channels &&
               out.len == new_height * new_width * channels;
    int whole = 1;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS;
        whole = shrunk(in.buf, height, width, channels, out.buf, new_height, new_width);
        Py_END_ALLOW_THREADS;
    }
    PyBuffer_Release(&in);
    PyBuffer_Release(&out);
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "the sizes do not belong to these pictures");
        return NULL;
    }
    if (!whole) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"shrink", shrink, METH_VARARGS, "shrink(pixels, out, height, width, channels, new_height, new_width)"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, .m_name = "vitscale_area", .m_size = 0, .m_methods = methods};

PyMODINIT_FUNC PyInit_vitscale_area(void) { return PyModuleDef_Init(&definition); }
