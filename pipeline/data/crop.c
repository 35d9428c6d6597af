/* The box of a JPEG that a crop needs, decoded and scaled in one pass: pixels in whole numbers, the same everywhere.
 *
 * libjpeg-turbo decodes the rows of the box alone and of each row the blocks around it, with a margin that is cut off
 * afterwards: interpolated colour at an edge needs the neighbours beyond. So the pixels are those of a full decode. A
 * box many times as large as wanted is decoded at a half, a quarter or an eighth of its size.
 *
 * Legend: s, the box is decoded at 1/s; taps, the source pixels that a target pixel is made of.
 *
 * A target pixel is the weighted mean of the source pixels around its place, along each axis by itself. The weights
 * fall linearly with the distance between the centres, to nothing at `reach`: the spacing of the target's pixels where
 * that is larger than the source's (antialiased; the triangle filter of Heckbert, "Filter", Graphics Gems III, 1992),
 * else the spacing of the source's. They are units of 2^-15 and sum to one exactly. First the rows are averaged, with
 * seven bits behind the point, then the columns, rounded to nearest.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <jpeglib.h>
#include <jerror.h>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define WIDE __attribute__((target_clones("avx2", "default")))
#else
#define WIDE
#endif

#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
enum { BYTE = 3 }; /* where the lowest byte of four lies */
#else
enum { BYTE = 0 };
#endif

/* A box is decoded at a size that is still SPARE times the target's: with less, libjpeg's way of averaging shows. */
enum { AT_ONCE = 64, SPARE = 3, LARGEST_REDUCTION = 8, MOST_TAPS = 64, MOST_MEMORY = 1 << 28 };

typedef uint16_t eight16 __attribute__((vector_size(16)));
typedef uint32_t eight32 __attribute__((vector_size(32)));
typedef uint8_t many8 __attribute__((vector_size(32)));

/* One axis of the box, in pixels of the original, and of the target. */
typedef struct {
    int64_t from, length, to;
} Side;

/* One axis: an even number of `taps` weights for each target pixel, from source pixel first[i] of the box on. */
typedef struct {
    int taps;
    int32_t *first;
    uint16_t *weight;
} Axis;

typedef struct {
    struct jpeg_error_mgr base;
    jmp_buf escape;
    char message[JMSG_LENGTH_MAX];
    int unsupported, memory;
} Errors;

typedef struct {
    struct jpeg_decompress_struct jpeg;
    Errors errors;
    Side down, across;
    int antialiased, mirrored;
    uint8_t *out;
    /* What follows is owned, and freed in every case. */
    Axis rows, columns;
    uint8_t *ring;          /* the last rows.taps decoded rows, row y at y % rows.taps */
    const uint8_t **row_of; /* those in the ring that a target row is made of */
    eight32 *pairs;         /* the weights of the columns */
    uint16_t *mean;         /* one averaged row of the box */
    /* What follows is not. */
    int64_t stride; /* bytes of a decoded row */
    int64_t left;   /* of the box in a decoded row, in pixels */
    int64_t read;   /* rows of the box that are decoded */
} Job;

static void escape(j_common_ptr jpeg) {
    Errors *errors = (Errors *)jpeg->err;
    int code = errors->base.msg_code;
    errors->base.format_message(jpeg, errors->message);
    errors->unsupported = code == JERR_BAD_PRECISION || code == JERR_SOF_UNSUPPORTED || code == JERR_ARITH_NOTIMPL ||
                          code == JERR_CONVERSION_NOTIMPL || code == JERR_NO_BACKING_STORE || code == JERR_NOTIMPL;
    longjmp(errors->escape, 1);
}

/* A warning is an error: what follows it is guessed. */
static void warned(j_common_ptr jpeg, int level) {
    if (level < 0) escape(jpeg);
}

static void refuse(Job *job, int unsupported, const char *message) {
    snprintf(job->errors.message, sizeof job->errors.message, "%s", message);
    job->errors.unsupported = unsupported;
    longjmp(job->errors.escape, 1);
}

static void refuse_memory(Job *job) {
    job->errors.memory = 1;
    longjmp(job->errors.escape, 1);
}

static void *memory(Job *job, size_t count, size_t size) {
    void *found = calloc(count, size);
    if (!found) refuse_memory(job);
    return found;
}

static int64_t ceiling(int64_t of, int64_t by) { return (of + by - 1) / by; }

/* How much smaller to decode. Two neighbours alone are to be those of the original. */
static int reduction(const Job *job) {
    int s = job->antialiased ? LARGEST_REDUCTION : 1;
    while (s > 1 && (job->down.length < SPARE * s * job->down.to || job->across.length < SPARE * s * job->across.to))
        s /= 2;
    return s;
}

/* The weights of an axis whose `side` is decoded at 1/s. Distances are in 1 / (2 * s * to) of the decoded spacing. */
static void weigh(Job *job, Axis *axis, Side side, int s, int mirrored) {
    int64_t begin = side.from / s, end = ceiling(side.from + side.length, s), step = 2 * s * side.to;
    int64_t reach = job->antialiased && 2 * side.length > step ? 2 * side.length : step;
    axis->taps = (int)ceiling(ceiling(2 * reach, step), 2) * 2;
    if (axis->taps > MOST_TAPS) refuse(job, 1, "a box that is so many times as large as wanted");
    axis->first = memory(job, (size_t)side.to, sizeof(int32_t));
    axis->weight = memory(job, (size_t)side.to * (size_t)axis->taps, sizeof(uint16_t));
    for (int64_t i = 0; i < side.to; i++) {
        int64_t centre = 2 * side.from * side.to + (2 * i + 1) * side.length - step / 2; /* of source pixel 0: 0 */
        int64_t first = centre >= reach ? (centre - reach) / step + 1 : 0, total = 0, sum = 0, given = 0;
        if (first < begin) first = begin;
        int64_t place = mirrored ? side.to - 1 - i : i;
        axis->first[place] = (int32_t)(first - begin);
        for (int pass = 0; pass < 2; pass++, total = sum, sum = 0)
            for (int k = 0; k < axis->taps; k++) {
                int64_t distance = llabs((first + k) * step - centre);
                if (distance < reach && first + k < end) sum += reach - distance;
                if (!pass) continue;
                int64_t until = (sum * 65536 + total) / (2 * total);
                axis->weight[place * axis->taps + k] = (uint16_t)(until - given);
                given = until;
            }
    }
}

/* The weighted sum of `taps` rows, in 2^-7; `n` values, and up to AT_ONCE more. Each tap loses what is below: half a
 * unit on average, which is added at the start; MOST_TAPS keeps what remains below half a shade. */
WIDE static void mean_of_rows(const uint8_t *const *row_of, const uint16_t *weight, int taps, int64_t n,
                              uint16_t *restrict out) {
    for (int64_t x = 0; x < n; x += AT_ONCE) {
        uint16_t sum[AT_ONCE];
        for (int i = 0; i < AT_ONCE; i++) sum[i] = (uint16_t)(taps / 2);
        for (int k = 0; k < taps; k++) {
            const uint8_t *restrict row = row_of[k] + x;
            const uint16_t w = weight[k];
            if (w) /* the number of taps is rounded up; without this, gcc interleaves the loops, at half the speed */
                for (int i = 0; i < AT_ONCE; i++) sum[i] += (uint16_t)(((uint32_t)(uint16_t)(row[i] << 8) * w) >> 16);
        }
        for (int i = 0; i < AT_ONCE; i++) out[x + i] = sum[i];
    }
}

/* The weighted sums of pixels of a row, two at a time: `in` is longer than the box by as many as there are taps. */
WIDE static void mean_of_columns(const uint16_t *in, const int32_t *first, const eight32 *weight, int taps, int64_t n,
                                 uint8_t *out) {
    for (int64_t x = 0; x < n; x++) {
        eight32 sum = {1u << 21, 1u << 21, 1u << 21};
        for (int k = 0; k < taps; k += 2) {
            eight16 here; /* red, green, blue of a pixel and of the next, and two values without weight */
            memcpy(&here, in + 3 * (first[x] + k), sizeof here);
            sum += __builtin_convertvector(here, eight32) * *weight++;
        }
        sum += __builtin_shuffle(sum, (eight32){3, 4, 5, 3, 4, 5, 3, 4});
        many8 bytes = __builtin_shuffle((many8)(sum >> 22), (many8){BYTE, BYTE + 4, BYTE + 8, BYTE + 12});
        memcpy(out + 3 * x, &bytes, x + 1 < n ? 4 : 3); /* the fourth is overwritten by the next pixel */
    }
}

/* Each pair of weights of an axis as its pixels lie in a row. */
static eight32 *paired(Job *job, const Axis *axis, int64_t to) {
    size_t count = (size_t)to * (size_t)axis->taps / 2;
    eight32 *pairs = aligned_alloc(sizeof(eight32), count * sizeof(eight32));
    if (!pairs) refuse_memory(job);
    for (size_t i = 0; i < count; i++) {
        const uint32_t a = axis->weight[2 * i], b = axis->weight[2 * i + 1];
        pairs[i] = (eight32){a, a, a, b, b, b};
    }
    return pairs;
}

static void read_row(Job *job, uint8_t *row) {
    jpeg_read_scanlines(&job->jpeg, &row, 1);
    job->read++;
}

/* The box in its own size. */
static void copied(Job *job) {
    int64_t width = job->across.to;
    for (uint8_t *out = job->out; job->read < job->down.to; out += 3 * width) {
        read_row(job, job->ring);
        const uint8_t *row = job->ring + 3 * job->left;
        if (!job->mirrored) memcpy(out, row, (size_t)(3 * width));
        for (int64_t x = 0; job->mirrored && x < width; x++) memcpy(out + 3 * (width - 1 - x), row + 3 * x, 3);
    }
}

static void scaled(Job *job, int s) {
    int64_t width = ceiling(job->across.from + job->across.length, s) - job->across.from / s;
    int64_t height = ceiling(job->down.from + job->down.length, s) - job->down.from / s;
    const uint8_t *box = job->ring + job->left * 3;
    int taps = job->rows.taps;
    job->pairs = paired(job, &job->columns, job->across.to);
    job->row_of = memory(job, (size_t)taps, sizeof(uint8_t *));
    job->mean = memory(job, (size_t)((width + job->columns.taps) * 3 + AT_ONCE), sizeof(uint16_t));
    for (int64_t y = 0; y < job->down.to; y++) {
        int64_t first = job->rows.first[y], last = first + taps;
        while (job->read < last && job->read < height) read_row(job, job->ring + job->read % taps * job->stride);
        for (int k = 0; k < taps; k++) job->row_of[k] = box + (first + k) % taps * job->stride;
        mean_of_rows(job->row_of, job->rows.weight + y * taps, taps, width * 3, job->mean);
        mean_of_columns(job->mean, job->columns.first, job->pairs, job->columns.taps, job->across.to,
                        job->out + y * job->across.to * 3);
    }
}

static void check_header(Job *job) {
    j_decompress_ptr jpeg = &job->jpeg;
    const uint8_t *begin = jpeg->src->next_input_byte, *end = begin + jpeg->src->bytes_in_buffer;
    const int colours = jpeg->jpeg_color_space;
    if (colours != JCS_GRAYSCALE && colours != JCS_YCbCr && colours != JCS_RGB)
        refuse(job, 1, "a JPEG that is neither grey, YCbCr nor RGB");
    if (job->across.from + job->across.length > jpeg->image_width ||
        job->down.from + job->down.length > jpeg->image_height)
        refuse(job, 0, "the box reaches beyond the picture");
    /* The box may end above the place where the data do. Within them 0xFF is followed by other bytes than 0xD9. */
    while (end - begin >= 2 && !(end[-2] == 0xFF && end[-1] == JPEG_EOI)) end--;
    if (end - begin < 2) ERREXIT(jpeg, JWRN_JPEG_EOF);
}

static void decoded(Job *job, const uint8_t *data, size_t length) {
    j_decompress_ptr jpeg = &job->jpeg;
    jpeg_create_decompress(jpeg);
    jpeg->mem->max_memory_to_use = MOST_MEMORY;
    jpeg_mem_src(jpeg, data, (unsigned long)length);
    jpeg_read_header(jpeg, TRUE);
    check_header(job);
    int s = reduction(job), same = job->across.length == job->across.to && job->down.length == job->down.to;
    jpeg->scale_num = 1;
    jpeg->scale_denom = (unsigned)s;
    jpeg->out_color_space = JCS_RGB;
    jpeg->dct_method = JDCT_ISLOW;
    jpeg_start_decompress(jpeg);

    int64_t margin = 2 * jpeg->max_h_samp_factor, begin = job->across.from / s - margin;
    int64_t end = ceiling(job->across.from + job->across.length, s) + margin;
    JDIMENSION x = begin > 0 ? (JDIMENSION)begin : 0;
    JDIMENSION width = (end < jpeg->output_width ? (JDIMENSION)end : jpeg->output_width) - x;
    jpeg_crop_scanline(jpeg, &x, &width);
    job->left = job->across.from / s - x;
    job->stride = (int64_t)width * 3;
    if (!same) {
        weigh(job, &job->rows, job->down, s, 0);
        weigh(job, &job->columns, job->across, s, job->mirrored);
    }
    job->ring = memory(job, (size_t)(job->stride * (same ? 1 : job->rows.taps) + AT_ONCE), 1);
    jpeg_skip_scanlines(jpeg, (JDIMENSION)(job->down.from / s));
    if (same)
        copied(job);
    else
        scaled(job, s);
}

/* Whether it went well; if not, job->errors says why. */
static int done(Job *job, const uint8_t *data, size_t length) {
    job->jpeg.err = jpeg_std_error(&job->errors.base);
    job->errors.base.error_exit = escape;
    job->errors.base.emit_message = warned;
    volatile int well = 0;
    if (setjmp(job->errors.escape) == 0) {
        decoded(job, data, length);
        well = 1;
    }
    jpeg_destroy_decompress(&job->jpeg);
    free(job->rows.first);
    free(job->rows.weight);
    free(job->columns.first);
    free(job->columns.weight);
    free(job->ring);
    free(job->row_of);
    free(job->pairs);
    free(job->mean);
    return well;
}

static PyObject *complaint(PyObject *module, const Errors *errors) {
    if (errors->memory) return PyErr_NoMemory();
    PyObject *kind = errors->unsupported ? PyObject_GetAttrString(module, "Unsupported") : Py_NewRef(PyExc_ValueError);
    if (kind) PyErr_SetString(kind, errors->message);
    Py_XDECREF(kind);
    return NULL;
}

static int possible(Side side) {
    return side.from >= 0 && 0 < side.length && side.from <= JPEG_MAX_DIMENSION && side.length <= JPEG_MAX_DIMENSION &&
           0 < side.to && side.to <= JPEG_MAX_DIMENSION;
}

static PyObject *crop(PyObject *module, PyObject *arguments) {
    Py_buffer data, out;
    Py_ssize_t left, top, width, height, out_height, out_width;
    int mirrored, antialiased;
    if (!PyArg_ParseTuple(arguments, "y*w*nnnnnnpp", &data, &out, &left, &top, &width, &height, &out_height, &out_width,
                          &mirrored, &antialiased))
        return NULL;
    PyObject *answer = NULL;
    Side down = {top, height, out_height}, across = {left, width, out_width};
    Job *job = calloc(1, sizeof *job);
    if (!job) {
        PyErr_NoMemory();
    } else if (!possible(down) || !possible(across) || out.len != 3 * out_width * out_height) {
        PyErr_SetString(PyExc_ValueError, "the box or the size does not belong to a picture");
    } else {
        int well;
        job->down = down, job->across = across, job->out = out.buf;
        job->mirrored = mirrored, job->antialiased = antialiased;
        Py_BEGIN_ALLOW_THREADS;
        well = done(job, data.buf, (size_t)data.len);
        Py_END_ALLOW_THREADS;
        answer = well ? Py_NewRef(Py_None) : complaint(module, &job->errors);
    }
    free(job);
    PyBuffer_Release(&data);
    PyBuffer_Release(&out);
    return answer;
}

static int prepare(PyObject *module) {
    PyObject *unsupported = PyErr_NewException("vitscale_crop.Unsupported", PyExc_ValueError, NULL);
    int added = unsupported ? PyModule_AddObjectRef(module, "Unsupported", unsupported) : -1;
    Py_XDECREF(unsupported);
    return added;
}

static PyMethodDef methods[] = {
    {"crop", crop, METH_VARARGS,
     "crop(data, out, left, top, width, height, out_height, out_width, mirrored, antialiased)"},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{Py_mod_exec, prepare}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "vitscale_crop", .m_size = 0, .m_methods = methods, .m_slots = slots};

PyMODINIT_FUNC PyInit_vitscale_crop(void) { return PyModuleDef_Init(&definition); }
