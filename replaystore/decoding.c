/* Decodes many chunks in one call, without the interpreter's share of each.
 *
 * Only chunks as `codec.py` nearly always finds them are done here: a whole checksum, a frame of one
 * plain lz4 block. At any other one a call stops, and the caller goes on in Python, which knows the
 * other layouts and names the damage. lz4 and the checksum are the C functions of numcodecs and
 * google-crc32c, whose addresses the caller passes. The GIL is not held meanwhile.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

enum { HEADER = 24, SMALLEST = 28, LINE = 64, AHEAD = 4096, LONG = 1 << 22 };

static const uint32_t RESIDUE = 0x48674BC7;    /* crc32c of bytes and their own crc32c */
static const uint32_t KIND = 0xFF0000, PLAIN_LZ4 = 0x200000;

typedef int (*Lz4)(const char *source, char *target, int size, int wanted, int capacity);
typedef uint32_t (*Crc32c)(const uint8_t *data, size_t nbytes);

typedef struct {
    Lz4 lz4;
    Crc32c crc32c;
    int64_t chunk_nbytes;
} Codec;

/* Decode the first `wanted` bytes of a chunk; 0 if it is not a whole frame of one plain lz4 block. */
static int decode(const Codec *codec, const uint8_t *source, int64_t nbytes, char *target, int64_t wanted)
{
    uint32_t words[6];
    if (nbytes < SMALLEST || nbytes > INT32_MAX || codec->crc32c(source, (size_t)nbytes) != RESIDUE)
        return 0;
    memcpy(words, source, sizeof words);
    if ((words[0] & KIND) != PLAIN_LZ4 || words[1] != codec->chunk_nbytes || words[2] != codec->chunk_nbytes
        || words[3] != nbytes - 4 || words[4] != 20 || words[5] != nbytes - SMALLEST)
        return 0;
    return codec->lz4((const char *)source + HEADER, target, (int)words[5], (int)wanted, (int)wanted) == wanted;
}

/* Have the processor get a chunk that is decoded soon. */
static void ask_for(const uint8_t *source, int64_t nbytes)
{
    for (int64_t at = 0; at < nbytes && at < AHEAD; at += LINE)
        __builtin_prefetch(source + at);
}

/* Copy to memory, not to the caches: what is too long for them would be read from there first, in vain. */
static void copy_past_caches(char *out, const char *row, int64_t nbytes)
{
#ifdef __SSE2__
    if (((uintptr_t)out | (uintptr_t)row | (uintptr_t)nbytes) % sizeof(__m128i) == 0) {
        for (int64_t at = 0; at < nbytes; at += (int64_t)sizeof(__m128i))
            _mm_stream_si128((__m128i *)(out + at), _mm_load_si128((const __m128i *)(row + at)));
        return;
    }
#endif
    memcpy(out, row, (size_t)nbytes);
}

/* After that: have it done before anybody is told. */
static void settle(void)
{
#ifdef __SSE2__
    _mm_sfence();
#endif
}

typedef struct {
    Py_buffer view;
    int64_t *items;
    Py_ssize_t length;
} Int64s;

static int get_int64s(PyObject *object, Int64s *array)
{
    if (PyObject_GetBuffer(object, &array->view, PyBUF_SIMPLE) < 0)
        return -1;
    array->items = array->view.buf;
    array->length = array->view.len / (Py_ssize_t)sizeof(int64_t);
    return 0;
}

/* Whether the rows of each chunk lie in it and go to rows of `out`, and the chunks' rows are all rows. */
static int fits(const Int64s *first, const Int64s *within, const Int64s *to, Py_ssize_t chunks, int64_t chunk_rows,
                int64_t out_rows)
{
    if (first->length != chunks + 1 || first->items[0] != 0 || first->items[chunks] != within->length
        || to->length != within->length)
        return 0;
    for (Py_ssize_t chunk = 0; chunk < chunks; chunk++)
        if (first->items[chunk] >= first->items[chunk + 1])
            return 0;
    for (Py_ssize_t row = 0; row < within->length; row++)
        if (within->items[row] < 0 || within->items[row] >= chunk_rows || to->items[row] < 0
            || to->items[row] >= out_rows)
            return 0;
    return 1;
}

static Py_ssize_t take_each(const Codec *codec, const Int64s *start, const Int64s *nbytes, const Int64s *first,
                            const Int64s *within, const Int64s *to, char *out, char *scratch,
                            int64_t row_nbytes)
{
    const int is_long = within->length * row_nbytes > LONG;
    Py_ssize_t chunk = 0;
    for (; chunk < start->length; chunk++) {
        int64_t last = 0;
        if (chunk + 1 < start->length)
            ask_for((const uint8_t *)start->items[chunk + 1], nbytes->items[chunk + 1]);
        for (int64_t row = first->items[chunk]; row < first->items[chunk + 1]; row++)
            last = within->items[row] > last ? within->items[row] : last;
        if (!decode(codec, (const uint8_t *)start->items[chunk], nbytes->items[chunk], scratch,
                    (last + 1) * row_nbytes))
            break;
        for (int64_t row = first->items[chunk]; row < first->items[chunk + 1]; row++) {
            char *target = out + to->items[row] * row_nbytes;
            const char *source = scratch + within->items[row] * row_nbytes;
            if (is_long)
                copy_past_caches(target, source, row_nbytes);
            else
                memcpy(target, source, (size_t)row_nbytes);
        }
    }
    settle();
    return chunk;
}

PyDoc_STRVAR(take_rows_doc,
"take_rows(start, nbytes, first, within, to, out, scratch, row_nbytes, lz4, crc32c)\n--\n\n"
"Copy rows of chunks in memory; returns how many chunks were done before one that Python has to see.\n\n"
"`start` and `nbytes`, int64 (chunks,), are their addresses and sizes. The rows `within`, int64 (rows,),\n"
"are those of chunk i from `first[i]` to `first[i + 1]`, and go to the rows `to`, int64 (rows,), of `out`.\n"
"`scratch` is as long as a decoded chunk. Raises ValueError if sizes do not match.");

static PyObject *take_rows(PyObject *module, PyObject *arguments)
{
    PyObject *objects[5];
    Int64s arrays[5];
    Py_buffer out, scratch;
    Py_ssize_t row_nbytes, done = -1;
    unsigned long long lz4, crc32c;
    int got = 0;

    if (!PyArg_ParseTuple(arguments, "OOOOOw*w*nKK", &objects[0], &objects[1], &objects[2], &objects[3],
                          &objects[4], &out, &scratch, &row_nbytes, &lz4, &crc32c))
        return NULL;
    while (got < 5 && get_int64s(objects[got], &arrays[got]) == 0)
        got++;
    if (got == 5) {
        const Int64s *start = &arrays[0], *nbytes = &arrays[1], *first = &arrays[2], *within = &arrays[3];
        const Int64s *to = &arrays[4];
        const Codec codec = {(Lz4)(uintptr_t)lz4, (Crc32c)(uintptr_t)crc32c, scratch.len};
        if (row_nbytes < 1 || scratch.len > INT32_MAX || nbytes->length != start->length
            || !fits(first, within, to, start->length, scratch.len / row_nbytes, out.len / row_nbytes)) {
            PyErr_SetString(PyExc_ValueError, "take_rows: expected arrays of matching sizes");
        } else {
            Py_BEGIN_ALLOW_THREADS
            done = take_each(&codec, start, nbytes, first, within, to, out.buf, scratch.buf, row_nbytes);
            Py_END_ALLOW_THREADS
        }
    }
    while (got--)
        PyBuffer_Release(&arrays[got].view);
    PyBuffer_Release(&out);
    PyBuffer_Release(&scratch);
    return PyErr_Occurred() ? NULL : PyLong_FromSsize_t(done);
}

static PyMethodDef methods[] = {
    {"take_rows", take_rows, METH_VARARGS, take_rows_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "replaystore.decoding", .m_size = 0, .m_methods = methods,
};

PyMODINIT_FUNC PyInit_decoding(void)
{
    return PyModuleDef_Init(&definition);
}
