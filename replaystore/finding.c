/* Which items come next, the episodes that they belong to, and their rows: of many items in one call each.
 *
 * The index and the rows are larger than the processor's caches where a store is large: what one item needs of
 * them is asked for while others are looked at. Where there is no compiler, `orders.py` and `index.py` do the same
 * with numpy, and `reader.py` reads row by row.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

enum { COLUMNS = 8, COPIED = 7, SHIFT = 6, END = 7, AT_ONCE = 128, MOSTLY = 2, STEPS = 2 };
enum { FIRST_AHEAD = 64, REST_AHEAD = 48 };     /* runs */
enum { LINE = 64, ASKED = 512 };                /* bytes: the processor foresees what follows */
enum { ALL_BUT_THE_FIRST = 2 };                 /* caches, as the second can wait for more at a time */

typedef struct {
    const int64_t *rows; /* COLUMNS of each episode; at END, the items up to and with it */
    int64_t count;
    const int32_t *buckets; /* an episode at or before that of every 2^bits-th item */
    int64_t buckets_count;
    int bits;
} Index;

typedef struct {
    const char *first;
    Py_ssize_t step; /* bytes from one to the next */
    Py_ssize_t length;
} Numbers;

static int64_t number_at(const Numbers *numbers, Py_ssize_t i)
{
    int64_t number; /* which may lie anywhere */
    memcpy(&number, numbers->first + i * numbers->step, sizeof number);
    return number;
}

static const int64_t *row_of(const Index *index, int64_t episode)
{
    return index->rows + episode * COLUMNS;
}

/* An episode at or before that of an item. */
static int64_t begin_at(const Index *index, int64_t number)
{
    const int64_t bucket = number >> index->bits;
    if (index->buckets_count == 0)
        return 0;
    const int64_t episode = index->buckets[bucket < index->buckets_count ? bucket : index->buckets_count - 1];
    return episode >= 0 && episode < index->count ? episode : 0;
}

static int are_below(const Numbers *numbers, int64_t end)
{
    int inside = 1;
    for (Py_ssize_t i = 0; i < numbers->length; i++)
        inside &= number_at(numbers, i) >= 0 && number_at(numbers, i) < end;
    return inside;
}

/* The row of an item's episode, which is `low` or a later one. */
static const int64_t *find(const Index *index, int64_t number, int64_t low)
{
    int64_t high = index->count;
    for (int step = 0; step < MOSTLY; step++) /* without branches, which could not be foreseen */
        low += row_of(index, low)[END] <= number;
    for (int step = 0; step < STEPS; step++, low++)
        if (row_of(index, low)[END] > number)
            return row_of(index, low);
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (row_of(index, middle)[END] > number)
            high = middle;
        else
            low = middle + 1;
    }
    return row_of(index, low);
}

static void locate_each(const Index *index, const Numbers *numbers, int64_t stride, int64_t *out)
{
    const Py_ssize_t length = numbers->length;
    int64_t low[AT_ONCE];
    for (Py_ssize_t start = 0; start < length; start += AT_ONCE) {
        const Py_ssize_t count = length - start < AT_ONCE ? length - start : AT_ONCE;
        for (Py_ssize_t i = 0; i < count; i++) {
            low[i] = begin_at(index, number_at(numbers, start + i));
            __builtin_prefetch(row_of(index, low[i]));
            __builtin_prefetch(row_of(index, low[i] + 1));
        }
        for (Py_ssize_t i = 0; i < count; i++) {
            const int64_t number = number_at(numbers, start + i);
            const int64_t *row = find(index, number, low[i]);
            for (int column = 0; column < COPIED; column++)
                out[column * length + start + i] = row[column];
            out[SHIFT * length + start + i] = (int64_t)((uint64_t)row[SHIFT] + (uint64_t)number * (uint64_t)stride);
        }
    }
}

static int get_integers(PyObject *object, Py_buffer *view, int flags, int dimensions, Py_ssize_t nbytes)
{
    if (PyObject_GetBuffer(object, view, flags) < 0)
        return -1;
    if (view->ndim == dimensions && view->itemsize == nbytes)
        return 0;
    PyBuffer_Release(view);
    PyErr_SetString(PyExc_ValueError, "expected arrays of integers, of their sizes and dimensions");
    return -1;
}

static int get_int64s(PyObject *object, Py_buffer *view, int flags, int dimensions)
{
    return get_integers(object, view, flags, dimensions, sizeof(int64_t));
}

/* None, or the error that was set. */
static PyObject *finish(Py_buffer *views, int got)
{
    while (got--)
        PyBuffer_Release(&views[got]);
    if (PyErr_Occurred())
        return NULL;
    Py_RETURN_NONE;
}

PyDoc_STRVAR(locate_doc,
"locate(numbers, rows, count, buckets, bits, stride, out)\n--\n\n"
"Copy the rows, int64 (episodes, 8), of the episodes that items belong to: out[column, i] is of numbers[i],\n"
"plus numbers[i] * stride in column 6. Column 7, which is not copied, counts the items up to and with each.\n\n"
"`numbers` is int64 (items,) and `out` int64 (7, items). Rows after the first `count` are not looked at.\n"
"`buckets`, int32, has an episode at or before that of every 2^bits-th item; it may be empty.\n"
"Raises IndexError for a number without an episode, ValueError if sizes do not match.");

static PyObject *locate(PyObject *module, PyObject *arguments)
{
    enum { NUMBERS, ROWS, BUCKETS, OUT, BUFFERS };
    static const int flags[] = {PyBUF_STRIDES, PyBUF_ND, PyBUF_ND, PyBUF_ND | PyBUF_WRITABLE};
    static const int dimensions[] = {1, 2, 1, 2};
    static const Py_ssize_t nbytes[] = {sizeof(int64_t), sizeof(int64_t), sizeof(int32_t), sizeof(int64_t)};
    PyObject *objects[BUFFERS];
    Py_buffer views[BUFFERS];
    int bits, got = 0;
    Py_ssize_t count;
    long long stride;

    if (!PyArg_ParseTuple(arguments, "OOnOiLO", &objects[NUMBERS], &objects[ROWS], &count,
                          &objects[BUCKETS], &bits, &stride, &objects[OUT]))
        return NULL;
    while (got < BUFFERS && get_integers(objects[got], &views[got], flags[got], dimensions[got], nbytes[got]) == 0)
        got++;
    if (got == BUFFERS) {
        const Numbers numbers = {views[NUMBERS].buf, views[NUMBERS].strides[0], views[NUMBERS].shape[0]};
        const Index index = {views[ROWS].buf, count, views[BUCKETS].buf, views[BUCKETS].shape[0], bits};
        const int fits = count >= 0 && count <= views[ROWS].shape[0]
                         && views[ROWS].shape[1] == COLUMNS && views[OUT].shape[0] == COPIED
                         && views[OUT].shape[1] == numbers.length && bits >= 0 && bits < 63;
        const int64_t items = fits && count ? row_of(&index, count - 1)[END] : 0;
        if (!fits)
            PyErr_SetString(PyExc_ValueError, "locate: expected arrays of matching sizes");
        else if (!are_below(&numbers, items))
            PyErr_SetString(PyExc_IndexError, "locate: expected numbers of items that there are");
        else
            locate_each(&index, &numbers, stride, views[OUT].buf);
    }
    return finish(views, got);
}

typedef struct {
    const char *first; /* row */
    Py_ssize_t row_nbytes;
    int64_t count; /* of rows at which a run may begin */
    Py_ssize_t nbytes, apart; /* of each piece of a run, and from one to the next */
} Runs;

/* Where a run begins, or what is no address, of a number without a run. */
static const char *run_at(const char *first, Py_ssize_t row_nbytes, int64_t number)
{
    return (const char *)((uintptr_t)first + (uintptr_t)number * (uintptr_t)row_nbytes);
}

/* Of the processor, which ignores what is no address. */
static void ask_for_first(const char *piece)
{
    __builtin_prefetch(piece, 0, ALL_BUT_THE_FIRST);
}

static void ask_for_rest(const char *piece, Py_ssize_t nbytes)
{
    for (Py_ssize_t at = LINE; at < nbytes; at += LINE)
        __builtin_prefetch(piece + at, 0, ALL_BUT_THE_FIRST);
    __builtin_prefetch(piece + nbytes - 1, 0, ALL_BUT_THE_FIRST);
}

/* Whether all of them are there; another thread may change numbers meanwhile.
 *
 * The rest of a run is asked for once its first bytes are on their way: where its page is has then been looked up,
 * and is not looked up again for each of its lines. It is compiled once for each call, as it is faster where the
 * compiler knows of how many pieces a run is.
 */
static inline __attribute__((always_inline)) int copy_each(
    const Runs *runs, Py_ssize_t pieces, const Numbers *numbers, char *out)
{
    const char *const first = runs->first; /* not read anew for each run, as `out` could be anywhere */
    const Py_ssize_t row_nbytes = runs->row_nbytes, nbytes = runs->nbytes, apart = runs->apart;
    const Py_ssize_t asked = nbytes < ASKED ? nbytes : ASKED;
    const Numbers each = *numbers;
    const int64_t count = runs->count;
    for (Py_ssize_t i = -FIRST_AHEAD; i < each.length; i++) {
        if (i + FIRST_AHEAD < each.length)
            for (Py_ssize_t piece = 0; piece < pieces; piece++)
                ask_for_first(run_at(first, row_nbytes, number_at(&each, i + FIRST_AHEAD)) + piece * apart);
        if (i + REST_AHEAD >= 0 && i + REST_AHEAD < each.length)
            for (Py_ssize_t piece = 0; piece < pieces; piece++)
                ask_for_rest(run_at(first, row_nbytes, number_at(&each, i + REST_AHEAD)) + piece * apart, asked);
        if (i < 0)
            continue;
        const int64_t number = number_at(&each, i);
        if (number < 0 || number >= count)
            return 0;
        for (Py_ssize_t piece = 0; piece < pieces; piece++, out += nbytes)
            memcpy(out, run_at(first, row_nbytes, number) + piece * apart, nbytes);
    }
    return 1;
}

PyDoc_STRVAR(copy_runs_doc,
"copy_runs(source, row_nbytes, length, apart, numbers, out)\n--\n\n"
"Copy of each run `length` rows of `source`, numbers[i], numbers[i] + apart and so on, one behind the other.\n\n"
"`source` and `out` are contiguous, `out` of as many rows as the runs have, and `numbers` is int64 (items,).\n"
"Raises IndexError for a run that is not inside `source`, ValueError if sizes do not match.");

static PyObject *copy_runs(PyObject *module, PyObject *arguments)
{
    enum { SOURCE, NUMBERS, OUT, BUFFERS };
    PyObject *objects[BUFFERS];
    Py_buffer views[BUFFERS];
    Py_ssize_t row_nbytes, length, apart;
    int got = 0;

    if (!PyArg_ParseTuple(arguments, "OnnnOO", &objects[SOURCE], &row_nbytes, &length, &apart, &objects[NUMBERS],
                          &objects[OUT]))
        return NULL;
    got += PyObject_GetBuffer(objects[SOURCE], &views[SOURCE], PyBUF_SIMPLE) == 0;
    got += got == NUMBERS && get_int64s(objects[NUMBERS], &views[NUMBERS], PyBUF_STRIDES, 1) == 0;
    got += got == OUT && PyObject_GetBuffer(objects[OUT], &views[OUT], PyBUF_WRITABLE) == 0;
    if (got == BUFFERS) {
        const Numbers numbers = {views[NUMBERS].buf, views[NUMBERS].strides[0], views[NUMBERS].shape[0]};
        const Py_ssize_t rows = row_nbytes > 0 ? views[SOURCE].len / row_nbytes : 0;
        const int fits = row_nbytes > 0 && length > 0 && apart > 0 && views[OUT].len % row_nbytes == 0
                         && views[OUT].len / row_nbytes % length == 0
                         && views[OUT].len / row_nbytes / length == numbers.length;
        const int is_there = fits && (length == 1 || apart <= (rows - 1) / (length - 1));
        int inside = numbers.length == 0;
        if (is_there) {
            const Py_ssize_t pieces = length == 1 || apart == 1 ? 1 : length;
            const Runs runs = {views[SOURCE].buf, row_nbytes, rows - (length - 1) * apart,
                               length / pieces * row_nbytes, pieces == 1 ? 0 : apart * row_nbytes};
            Py_BEGIN_ALLOW_THREADS /* rows may have to be read from disk */
            inside = pieces == 1 ? copy_each(&runs, 1, &numbers, views[OUT].buf)
                                 : copy_each(&runs, pieces, &numbers, views[OUT].buf);
            Py_END_ALLOW_THREADS
        }
        if (!fits)
            PyErr_SetString(PyExc_ValueError, "copy_runs: expected sizes that match");
        else if (!inside)
            PyErr_SetString(PyExc_IndexError, "copy_runs: expected runs inside the source");
    }
    return finish(views, got);
}

typedef struct {
    const uint64_t *keys; /* two a round */
    Py_ssize_t rounds;
    int low_bits, high_bits;
} Network;

/* As `orders.mixed`. */
static uint64_t mixed(uint64_t word)
{
    word += 0x9E3779B97F4A7C15;
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9;
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB;
    return word ^ (word >> 31);
}

static uint64_t scrambled(const Network *network, uint64_t number)
{
    const uint64_t low_mask = (1ull << network->low_bits) - 1, high_mask = (1ull << network->high_bits) - 1;
    uint64_t low = number & low_mask, high = number >> network->low_bits;
    for (Py_ssize_t round = 0; round < network->rounds; round++) {
        high ^= mixed(low ^ network->keys[2 * round]) & high_mask;
        low ^= mixed(high ^ network->keys[2 * round + 1]) & low_mask;
    }
    return high << network->low_bits | low;
}

/* Walk each of up to AT_ONCE numbers until it is below `length`: all by a step, then those that are not below it, as
 * nobody can foresee which are.
 */
static void walk_each(const Network *network, int64_t length, int64_t *numbers, Py_ssize_t count)
{
    Py_ssize_t left[AT_ONCE];
    for (Py_ssize_t i = 0; i < count; i++)
        left[i] = i;
    while (count) {
        Py_ssize_t outside = 0;
        for (Py_ssize_t i = 0; i < count; i++) {
            int64_t *number = &numbers[left[i]];
            *number = scrambled(network, *number);
            left[outside] = left[i];
            outside += *number >= length;
        }
        count = outside;
    }
}

PyDoc_STRVAR(take_order_doc,
"take_order(start, length, bits, keys, out)\n--\n\n"
"The numbers, int64, from position `start` on of a Feistel network over `bits` bits, walked until below `length`.\n\n"
"`keys`, uint64, has two of each round. Raises ValueError for positions from `length` on, or too few bits.");

static PyObject *take_order(PyObject *module, PyObject *arguments)
{
    enum { KEYS, OUT, BUFFERS };
    static const int flags[] = {PyBUF_ND, PyBUF_ND | PyBUF_WRITABLE};
    PyObject *objects[BUFFERS];
    Py_buffer views[BUFFERS];
    long long start, length;
    int bits, got = 0;

    if (!PyArg_ParseTuple(arguments, "LLiOO", &start, &length, &bits, &objects[KEYS], &objects[OUT]))
        return NULL;
    while (got < BUFFERS && get_int64s(objects[got], &views[got], flags[got], 1) == 0)
        got++;
    if (got == BUFFERS) {
        const Network network = {views[KEYS].buf, views[KEYS].shape[0] / 2, bits / 2, bits - bits / 2};
        const Py_ssize_t count = views[OUT].shape[0];
        int64_t *out = views[OUT].buf;
        if (bits < 1 || bits > 62 || length > 1ll << bits || length < count || start < 0 || start > length - count)
            PyErr_SetString(PyExc_ValueError, "take_order: expected positions below the length, and bits for it");
        else
            for (Py_ssize_t i = 0; i < count; i += AT_ONCE) {
                const Py_ssize_t some = count - i < AT_ONCE ? count - i : AT_ONCE;
                for (Py_ssize_t j = i; j < i + some; j++)
                    out[j] = start + j;
                walk_each(&network, length, out + i, some);
            }
    }
    return finish(views, got);
}

static PyMethodDef methods[] = {
    {"locate", locate, METH_VARARGS, locate_doc},
    {"copy_runs", copy_runs, METH_VARARGS, copy_runs_doc},
    {"take_order", take_order, METH_VARARGS, take_order_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "replaystore.finding", .m_size = 0, .m_methods = methods,
};

PyMODINIT_FUNC PyInit_finding(void)
{
    return PyModuleDef_Init(&definition);
}
