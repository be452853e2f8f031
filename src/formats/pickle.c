/* pickle.c: the stack machine of Python's pickles, protocols 2 to 5, as far as torch.save uses it
 * (opcodes: CPython's Lib/pickletools.py). Nothing is executed: a call is an entry of `names`
 * below, and its result is a plain value. What these tables do not list is refused by name, and
 * what is built is bounded by the limits below. */
#include "formats/pickle.h"

enum {
    MOST_VALUES = 1 << 21,
    MOST_MEMO = 1 << 21,
    MOST_MARKS = 4096,
    MOST_TEXT = 1 << 20,
    LARGEST_PROTOCOL = 5
};

typedef enum name_use {
    USE_TENSOR,    /* call: (storage, first, shape, strides, ...) */
    USE_PARAMETER, /* call: (tensor, ...) -> the tensor */
    USE_DICT,      /* call: () or (pairs) -> a dictionary */
    USE_OBJECT,    /* the same, and its attributes are entries */
    USE_TUPLE,     /* call: (tuple) -> the tuple */
    USE_STORAGE,   /* in persistent ids */
    USE_TYPE,      /* of a tensor over an untyped storage */
    USE_INERT      /* beside the tensors of training programs; any call gives nothing */
} name_use;

typedef struct pickle_name {
    const char *module, *name;
    name_use use;
    vel_file_type type;
    bool untyped;
} pickle_name;

/* The allow-list. Inert names are values that training programs leave beside the tensors. */
static const pickle_name names[] = {
    {"torch._utils", "_rebuild_tensor_v2", USE_TENSOR},
    {"torch._utils", "_rebuild_tensor_v3", USE_TENSOR},
    {"torch._utils", "_rebuild_tensor", USE_TENSOR},
    {"torch._utils", "_rebuild_parameter", USE_PARAMETER},
    {"collections", "OrderedDict", USE_DICT},
    {"collections", "defaultdict", USE_DICT},
    {"torch.nn.modules.container", "ParameterDict", USE_OBJECT},
    {"torch", "Size", USE_TUPLE},
    {"torch", "DoubleStorage", USE_STORAGE, VEL_FILE_F64},
    {"torch", "FloatStorage", USE_STORAGE, VEL_FILE_F32},
    {"torch", "HalfStorage", USE_STORAGE, VEL_FILE_F16},
    {"torch", "BFloat16Storage", USE_STORAGE, VEL_FILE_BF16},
    {"torch", "LongStorage", USE_STORAGE, VEL_FILE_I64},
    {"torch", "IntStorage", USE_STORAGE, VEL_FILE_I32},
    {"torch", "ShortStorage", USE_STORAGE, VEL_FILE_I16},
    {"torch", "CharStorage", USE_STORAGE, VEL_FILE_I8},
    {"torch", "ByteStorage", USE_STORAGE, VEL_FILE_U8},
    {"torch", "BoolStorage", USE_STORAGE, VEL_FILE_BOOL},
    {"torch.storage", "UntypedStorage", USE_STORAGE, VEL_FILE_U8, true},
    {"torch", "UntypedStorage", USE_STORAGE, VEL_FILE_U8, true},
    {"torch", "float64", USE_TYPE, VEL_FILE_F64},
    {"torch", "float32", USE_TYPE, VEL_FILE_F32},
    {"torch", "float16", USE_TYPE, VEL_FILE_F16},
    {"torch", "bfloat16", USE_TYPE, VEL_FILE_BF16},
    {"torch", "int64", USE_TYPE, VEL_FILE_I64},
    {"torch", "int32", USE_TYPE, VEL_FILE_I32},
    {"torch", "uint8", USE_TYPE, VEL_FILE_U8},
    {"torch", "float8_e4m3fn", USE_TYPE, VEL_FILE_F8_E4M3},
    {"torch", "float8_e5m2", USE_TYPE, VEL_FILE_F8_E5M2},
    {"torch", "device", USE_INERT},
    {"numpy.core.multiarray", "scalar", USE_INERT},
    {"numpy._core.multiarray", "scalar", USE_INERT},
    {"numpy", "dtype", USE_INERT},
    {"_codecs", "encode", USE_INERT},
    {"__builtin__", "set", USE_INERT},
    {"builtins", "set", USE_INERT},
    {"pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint", USE_INERT},
    {"pytorch_lightning.callbacks.early_stopping", "EarlyStopping", USE_INERT},
    {"pytorch_lightning.utilities.enums", "_FaultTolerantMode", USE_INERT},
};

typedef struct machine {
    pickle_run *run;
    const uint8_t *bytes;
    size_t n, at;
    pickle_value **stack; /* vel_alloc: grows and shrinks */
    int depth;
    int marks[MOST_MARKS];
    int n_marks;
    pickle_value **memo;
    int64_t n_memo, places_memo;
} machine;

static vel_status bad(const machine *m, const char *what)
{
    return vel_fail(m->run->ctx, VEL_BAD_FILE,
                    "%s: byte %zu of its pickle: %s; nothing was executed", m->run->path, m->at,
                    what);
}

/* ---- values ---- */

static pickle_value *make(machine *m, pickle_kind kind)
{
    if (++m->run->n_values > MOST_VALUES)
        return NULL;
    pickle_value *v = vel_arena_alloc(m->run->arena, sizeof *v);
    if (v)
        v->kind = kind;
    return v;
}

static bool append(machine *m, pickle_items *items, pickle_value *v)
{
    if (items->n == items->room) {
        if (items->room > MOST_VALUES)
            return false;
        int room = items->room ? items->room * 2 : 4;
        pickle_value **grown = vel_arena_alloc(m->run->arena, sizeof *grown * (size_t)room);
        if (!grown)
            return false;
        if (items->n)
            memcpy(grown, items->at, sizeof *grown * (size_t)items->n);
        items->at = grown;
        items->room = room;
    }
    items->at[items->n++] = v;
    return true;
}

static vel_status push(machine *m, pickle_value *v)
{
    if (!v)
        return m->run->n_values > MOST_VALUES ? bad(m, "it builds millions of values")
                                              : VEL_NO_MEMORY;
    if (m->depth > MOST_VALUES)
        return bad(m, "its stack has no end");
    VEL_TRY(vel_grow(m->run->ctx, &m->stack, (size_t)m->depth + 1));
    m->stack[m->depth++] = v;
    return VEL_OK;
}

/* The lowest place of the stack that may be taken: what lies above the last mark. */
static int ground(const machine *m)
{
    return m->n_marks ? m->marks[m->n_marks - 1] : 0;
}

static pickle_value *pop(machine *m)
{
    return m->depth > ground(m) ? m->stack[--m->depth] : NULL;
}

static pickle_value *top(const machine *m)
{
    return m->depth > ground(m) ? m->stack[m->depth - 1] : NULL;
}

/* Takes what lies above the last mark: *n values at *values (valid until the next push). */
static bool pop_mark(machine *m, pickle_value ***values, int *n)
{
    if (!m->n_marks)
        return false;
    int from = m->marks[--m->n_marks];
    *values = m->stack + from;
    *n = m->depth - from;
    m->depth = from;
    return true;
}

/* ---- reading ---- */

static bool take(machine *m, size_t n, const uint8_t **out)
{
    if (n > m->n - m->at)
        return false;
    *out = m->bytes + m->at;
    m->at += n;
    return true;
}

static bool take_number(machine *m, int bytes, uint64_t *out)
{
    const uint8_t *p;
    if (!take(m, (size_t)bytes, &p))
        return false;
    *out = 0;
    for (int i = 0; i < bytes; i++)
        *out |= (uint64_t)p[i] << 8 * i;
    return true;
}

static vel_status cut_short(const machine *m)
{
    return bad(m, "it ends in the middle; is the download complete?");
}

static vel_status push_integer(machine *m, int64_t value)
{
    pickle_value *v = make(m, PICKLE_INT);
    if (v)
        v->u.integer = value;
    return push(m, v);
}

/* Signed, little-endian; more than 64 bits are of no use to us. */
static vel_status push_long(machine *m)
{
    uint64_t length;
    const uint8_t *p;
    if (!take_number(m, 1, &length) || !take(m, length, &p))
        return cut_short(m);
    if (length > 8)
        return push(m, make(m, PICKLE_OTHER));
    uint64_t value = length && p[length - 1] & 0x80 ? ~(uint64_t)0 : 0;
    for (size_t i = 0; i < length; i++)
        value = (value & ~((uint64_t)0xff << 8 * i)) | (uint64_t)p[i] << 8 * i;
    return push_integer(m, (int64_t)value);
}

static vel_status push_float(machine *m)
{
    const uint8_t *p;
    uint64_t bits = 0;
    if (!take(m, 8, &p))
        return cut_short(m);
    for (int i = 0; i < 8; i++)
        bits = bits << 8 | p[i];
    pickle_value *v = make(m, PICKLE_FLOAT);
    if (v)
        memcpy(&v->u.real, &bits, 8);
    return push(m, v);
}

/* Text of protocol 2 and later; also Python 2's byte strings, where they are UTF-8. */
static vel_status push_text(machine *m, int length_bytes, bool is_bytes)
{
    uint64_t length;
    const uint8_t *p;
    if (!take_number(m, length_bytes, &length) || length > m->n || !take(m, length, &p))
        return cut_short(m);
    bool plain =
        length <= MOST_TEXT && vel_utf8_valid((const char *)p, length) && !memchr(p, 0, length);
    if (is_bytes || !plain)
        return push(m, make(m, PICKLE_OTHER));
    pickle_value *v = make(m, PICKLE_TEXT);
    char *text = v ? vel_arena_alloc(m->run->arena, length + 1) : NULL;
    if (v && !text)
        return VEL_NO_MEMORY;
    if (v) {
        memcpy(text, p, length);
        v->u.text = text;
    }
    return push(m, v);
}

/* ---- names and calls ---- */

static vel_status push_name(machine *m, const char *module, size_t n_module, const char *name,
                            size_t n_name)
{
    for (int i = 0; i < VEL_COUNT(names); i++)
        if (strlen(names[i].module) == n_module && strlen(names[i].name) == n_name &&
            memcmp(names[i].module, module, n_module) == 0 &&
            memcmp(names[i].name, name, n_name) == 0) {
            pickle_value *v = make(m, PICKLE_NAME);
            if (v)
                v->u.name = &names[i];
            return push(m, v);
        }
    char shown[128];
    snprintf(shown, sizeof shown, "%.*s.%.*s", (int)VEL_MIN(n_module, 60), module,
             (int)VEL_MIN(n_name, 60), name);
    for (char *c = shown; *c; c++)
        *c = (unsigned char)*c < ' ' || (unsigned char)*c > 126 ? '?' : *c;
    return vel_fail(m->run->ctx, VEL_BAD_FILE,
                    "%s: byte %zu of its pickle names %s, which no file of weights needs: the file "
                    "may be malicious. It was refused and nothing was executed; save the tensors "
                    "alone, best as safetensors",
                    m->run->path, m->at, shown);
}

/* GLOBAL: two lines. */
static vel_status read_global(machine *m)
{
    const char *line[2];
    size_t length[2];
    for (int i = 0; i < 2; i++) {
        const uint8_t *from = m->bytes + m->at;
        const uint8_t *end = memchr(from, '\n', VEL_MIN(m->n - m->at, (size_t)512));
        if (!end)
            return cut_short(m);
        line[i] = (const char *)from;
        length[i] = (size_t)(end - from);
        m->at += length[i] + 1;
    }
    return push_name(m, line[0], length[0], line[1], length[1]);
}

static vel_status stack_global(machine *m)
{
    const pickle_value *name = pop(m), *module = pop(m);
    if (!name || !module || name->kind != PICKLE_TEXT || module->kind != PICKLE_TEXT)
        return bad(m, "a name that is no text");
    return push_name(m, module->u.text, strlen(module->u.text), name->u.text, strlen(name->u.text));
}

static bool read_axes(const pickle_value *v, int64_t out[8], int *rank)
{
    if (v->kind != PICKLE_TUPLE || v->u.items.n > 8)
        return false;
    *rank = v->u.items.n;
    for (int i = 0; i < *rank; i++) {
        const pickle_value *x = v->u.items.at[i];
        if (x->kind != PICKLE_INT || x->u.integer < 0)
            return false;
        out[i] = x->u.integer;
    }
    return true;
}

/* (storage, first, shape, strides, requires_grad, hooks[, type, metadata]) */
static vel_status call_tensor(machine *m, const pickle_name *name, const pickle_items *args)
{
    pickle_tensor *t = vel_arena_alloc(m->run->arena, sizeof *t);
    pickle_value *v = make(m, PICKLE_TENSOR);
    int n_strides = 0;
    if (!t || !v)
        return push(m, NULL);
    bool fits = args->n >= 4 && args->n <= 8 && args->at[0]->kind == PICKLE_STORAGE &&
                args->at[1]->kind == PICKLE_INT && args->at[1]->u.integer >= 0 &&
                read_axes(args->at[2], t->dim, &t->rank) &&
                read_axes(args->at[3], t->stride, &n_strides) && n_strides == t->rank;
    if (!fits)
        return bad(m, "a tensor without storage, shape or strides");
    t->storage = args->at[0];
    t->first = args->at[1]->u.integer;
    t->type = t->storage->u.storage->type;
    bool typed = vel_has_suffix(name->name, "_v3");
    const pickle_value *type = typed && args->n > 6 ? args->at[6] : NULL;
    if (type && type->kind == PICKLE_NAME && type->u.name->use == USE_TYPE)
        t->type = type->u.name->type;
    else if (typed || t->storage->u.storage->untyped)
        return bad(m, "a tensor of a type that is not known");
    v->u.tensor = t;
    return push(m, v);
}

static bool add_entry(machine *m, pickle_value *dict, pickle_value *key, pickle_value *value)
{
    return append(m, &dict->u.items, key) && append(m, &dict->u.items, value);
}

/* OrderedDict(), OrderedDict(pairs), defaultdict(factory) */
static vel_status call_dict(machine *m, const pickle_items *args, bool is_object)
{
    pickle_value *v = make(m, PICKLE_DICT);
    if (!v)
        return push(m, v);
    v->is_object = is_object;
    const pickle_value *pairs = args->n ? args->at[0] : NULL;
    bool listed = pairs && pairs->kind == PICKLE_LIST;
    for (int i = 0; listed && i < pairs->u.items.n; i++) {
        const pickle_value *pair = pairs->u.items.at[i];
        if ((pair->kind != PICKLE_LIST && pair->kind != PICKLE_TUPLE) || pair->u.items.n != 2)
            return bad(m, "a dictionary of something else than pairs");
        if (!add_entry(m, v, pair->u.items.at[0], pair->u.items.at[1]))
            return VEL_NO_MEMORY;
    }
    return push(m, v);
}

/* REDUCE and NEWOBJ: name(*args). */
static vel_status call(machine *m)
{
    const pickle_value *args = pop(m), *callee = pop(m);
    if (!args || !callee || args->kind != PICKLE_TUPLE || callee->kind != PICKLE_NAME)
        return bad(m, "a call of something that has no name");
    const pickle_items *items = &args->u.items;
    switch (callee->u.name->use) {
    case USE_TENSOR:
        return call_tensor(m, callee->u.name, items);
    case USE_PARAMETER:
        if (items->n && items->at[0]->kind == PICKLE_TENSOR)
            return push(m, items->at[0]);
        return bad(m, "a parameter that is no tensor");
    case USE_DICT:
    case USE_OBJECT:
        return call_dict(m, items, callee->u.name->use == USE_OBJECT);
    case USE_TUPLE:
        if (items->n == 1 && items->at[0]->kind == PICKLE_TUPLE)
            return push(m, items->at[0]);
        return bad(m, "a size that is no tuple");
    case USE_INERT:
        return push(m, make(m, PICKLE_OTHER));
    default:
        return bad(m, "a call of a type");
    }
}

/* BUILD: attributes. Those of a dictionary object are its entries, others are of no use. */
static vel_status build(machine *m)
{
    const pickle_value *state = pop(m);
    pickle_value *object = top(m);
    if (!state || !object || (object->kind != PICKLE_DICT && object->kind != PICKLE_OTHER))
        return bad(m, "attributes of something that has none");
    bool entries = object->kind == PICKLE_DICT && object->is_object && state->kind == PICKLE_DICT;
    int n = entries ? state->u.items.n : 0; /* state may be the object itself */
    for (int i = 0; i + 1 < n; i += 2)
        if (!add_entry(m, object, state->u.items.at[i], state->u.items.at[i + 1]))
            return VEL_NO_MEMORY;
    return VEL_OK;
}

/* ("storage", type, key, place, count[, view]) where view is (key, first, count) or None */
static vel_status persistent(machine *m)
{
    const pickle_value *id = pop(m);
    const pickle_items *p = id && id->kind == PICKLE_TUPLE ? &id->u.items : NULL;
    bool fits = p && p->n >= 5 && p->n <= 6 && p->at[0]->kind == PICKLE_TEXT &&
                strcmp(p->at[0]->u.text, "storage") == 0 && p->at[1]->kind == PICKLE_NAME &&
                p->at[1]->u.name->use == USE_STORAGE && p->at[2]->kind == PICKLE_TEXT &&
                p->at[4]->kind == PICKLE_INT && p->at[4]->u.integer >= 0;
    if (!fits)
        return bad(m, "a reference to something that is no storage");
    pickle_storage *s = vel_arena_alloc(m->run->arena, sizeof *s);
    pickle_value *v = make(m, PICKLE_STORAGE);
    if (!s || !v)
        return push(m, NULL);
    *s = (pickle_storage){.key = p->at[2]->u.text,
                          .type = p->at[1]->u.name->type,
                          .untyped = p->at[1]->u.name->untyped,
                          .count = p->at[4]->u.integer,
                          .view_first = -1,
                          .next = m->run->storages};
    const pickle_value *view = p->n == 6 ? p->at[5] : NULL;
    if (view && view->kind != PICKLE_NONE) {
        const pickle_items *part = &view->u.items;
        if (view->kind != PICKLE_TUPLE || part->n != 3 || part->at[1]->kind != PICKLE_INT ||
            part->at[2]->kind != PICKLE_INT || part->at[1]->u.integer < 0 ||
            part->at[2]->u.integer < 0)
            return bad(m, "a part of a storage that has no place");
        s->view_first = part->at[1]->u.integer;
        s->count = part->at[2]->u.integer;
    }
    v->u.storage = s;
    m->run->storages = v;
    return push(m, v);
}

/* ---- containers ---- */

static vel_status push_items(machine *m, pickle_kind kind, pickle_value **values, int n)
{
    pickle_value *v = make(m, kind);
    for (int i = 0; v && i < n; i++)
        if (!append(m, &v->u.items, values[i]))
            return VEL_NO_MEMORY;
    return push(m, v);
}

static vel_status push_tuple(machine *m, int n)
{
    if (m->depth - ground(m) < n)
        return bad(m, "a tuple of more values than there are");
    m->depth -= n;
    pickle_value *values[3] = {NULL};
    for (int i = 0; i < n; i++)
        values[i] = m->stack[m->depth + i];
    return push_items(m, PICKLE_TUPLE, values, n);
}

static vel_status tuple_from_mark(machine *m)
{
    pickle_value **values;
    int n;
    if (!pop_mark(m, &values, &n))
        return bad(m, "a mark is missing");
    return push_items(m, PICKLE_TUPLE, values, n);
}

/* What lies above the mark goes into the list, set or dictionary below it. */
static vel_status add_from_mark(machine *m, pickle_kind kind)
{
    pickle_value **values;
    int n;
    pickle_value *into = pop_mark(m, &values, &n) ? top(m) : NULL;
    if (!into || (kind == PICKLE_DICT && n % 2))
        return bad(m, "entries without their container");
    if (into->kind == PICKLE_OTHER)
        return VEL_OK; /* of an inert object */
    if (into->kind != kind)
        return bad(m, "entries for another kind of container");
    for (int i = 0; i < n; i++)
        if (!append(m, &into->u.items, values[i]))
            return VEL_NO_MEMORY;
    return VEL_OK;
}

static vel_status add_last(machine *m, pickle_kind kind)
{
    pickle_value *value = pop(m), *key = kind == PICKLE_DICT ? pop(m) : value, *into = top(m);
    if (!value || !key || !into || (into->kind != kind && into->kind != PICKLE_OTHER))
        return bad(m, "an entry without its container");
    if (into->kind == PICKLE_OTHER)
        return VEL_OK;
    bool added =
        kind == PICKLE_DICT ? add_entry(m, into, key, value) : append(m, &into->u.items, value);
    return added ? VEL_OK : VEL_NO_MEMORY;
}

/* ---- memo ---- */

static vel_status remember(machine *m, uint64_t index)
{
    pickle_value *v = top(m);
    if (!v || index >= MOST_MEMO)
        return bad(m, v ? "a memo of millions of entries" : "nothing to remember");
    VEL_TRY(vel_grow(m->run->ctx, &m->memo, index + 1));
    m->places_memo = VEL_MAX(m->places_memo, (int64_t)index + 1);
    m->n_memo += m->memo[index] == NULL;
    m->memo[index] = v;
    return VEL_OK;
}

static vel_status recall(machine *m, uint64_t index)
{
    if ((int64_t)index >= m->places_memo || index >= MOST_MEMO || !m->memo[index])
        return bad(m, "a memo entry that was never made");
    return push(m, m->memo[index]);
}

static vel_status mark(machine *m)
{
    if (m->n_marks == MOST_MARKS)
        return bad(m, "thousands of open marks");
    m->marks[m->n_marks++] = m->depth;
    return VEL_OK;
}

/* ---- the program ---- */

static vel_status push_bool(machine *m, bool value)
{
    pickle_value *v = make(m, PICKLE_BOOL);
    if (v)
        v->u.integer = value;
    return push(m, v);
}

/* Opcodes with a number behind them. */
static vel_status numbered(machine *m, uint8_t op, int bytes)
{
    uint64_t x;
    if (!take_number(m, bytes, &x))
        return cut_short(m);
    switch (op) {
    case 0x80: /* PROTO */
        return x <= LARGEST_PROTOCOL ? VEL_OK : bad(m, "a protocol that is not known");
    case 0x95: /* FRAME: how much a reader may fetch at once */
        return VEL_OK;
    case 'J': /* BININT */
        return push_integer(m, (int32_t)(uint32_t)x);
    case 'K': /* BININT1 */
    case 'M': /* BININT2 */
        return push_integer(m, (int64_t)x);
    case 'q': /* BINPUT */
    case 'r': /* LONG_BINPUT */
        return remember(m, x);
    default: /* BINGET, LONG_BINGET */
        return recall(m, x);
    }
}

static const struct {
    uint8_t op;
    int bytes;
} number_ops[] = {{0x80, 1}, {0x95, 8}, {'J', 4}, {'K', 1}, {'M', 2},
                  {'q', 1},  {'r', 4},  {'h', 1}, {'j', 4}};
/* Text and byte strings: opcode, bytes of their length. */
static const struct {
    uint8_t op;
    int bytes;
    bool is_bytes;
} text_ops[] = {{'X', 4, false}, {0x8c, 1, false}, {0x8d, 8, false}, {'U', 1, false},
                {'T', 4, false}, {'B', 4, true},   {'C', 1, true},   {0x8e, 8, true}};

static vel_status step(machine *m, uint8_t op)
{
    for (int i = 0; i < VEL_COUNT(number_ops); i++)
        if (number_ops[i].op == op)
            return numbered(m, op, number_ops[i].bytes);
    for (int i = 0; i < VEL_COUNT(text_ops); i++)
        if (text_ops[i].op == op)
            return push_text(m, text_ops[i].bytes, text_ops[i].is_bytes);
    switch (op) {
    case 'N': /* NONE */
        return push(m, make(m, PICKLE_NONE));
    case 0x88: /* NEWTRUE */
    case 0x89: /* NEWFALSE */
        return push_bool(m, op == 0x88);
    case 0x8a: /* LONG1 */
        return push_long(m);
    case 'G': /* BINFLOAT */
        return push_float(m);
    case '(': /* MARK */
        return mark(m);
    case ')': /* EMPTY_TUPLE */
        return push_tuple(m, 0);
    case 0x85: /* TUPLE1, TUPLE2, TUPLE3 */
    case 0x86:
    case 0x87:
        return push_tuple(m, op - 0x84);
    case 't': /* TUPLE */
        return tuple_from_mark(m);
    case ']':  /* EMPTY_LIST */
    case 0x8f: /* EMPTY_SET */
        return push(m, make(m, PICKLE_LIST));
    case '}': /* EMPTY_DICT */
        return push(m, make(m, PICKLE_DICT));
    case 'a': /* APPEND */
        return add_last(m, PICKLE_LIST);
    case 's': /* SETITEM */
        return add_last(m, PICKLE_DICT);
    case 'e':  /* APPENDS */
    case 0x90: /* ADDITEMS */
        return add_from_mark(m, PICKLE_LIST);
    case 'u': /* SETITEMS */
        return add_from_mark(m, PICKLE_DICT);
    case 'c': /* GLOBAL */
        return read_global(m);
    case 0x93: /* STACK_GLOBAL */
        return stack_global(m);
    case 'R':  /* REDUCE */
    case 0x81: /* NEWOBJ */
        return call(m);
    case 'b': /* BUILD */
        return build(m);
    case 'Q': /* BINPERSID */
        return persistent(m);
    case 0x94: /* MEMOIZE */
        return remember(m, (uint64_t)m->n_memo);
    default:
        return vel_fail(m->run->ctx, VEL_BAD_FILE,
                        "%s: byte %zu of its pickle: opcode 0x%02x, which torch.save never writes; "
                        "nothing was executed",
                        m->run->path, m->at - 1, op);
    }
}

vel_status vel_pickle_run(pickle_run *r, const uint8_t *bytes, size_t n, size_t *used,
                          pickle_value **out)
{
    machine *m = vel_alloc(r->ctx, sizeof *m);
    if (!m)
        return VEL_NO_MEMORY;
    m->run = r;
    m->bytes = bytes;
    m->n = n;
    *out = NULL;
    vel_status st = VEL_OK;
    while (!st && !*out) {
        const uint8_t *op;
        if (!take(m, 1, &op))
            st = cut_short(m);
        else if (*op != '.') /* STOP */
            st = step(m, *op);
        else if (!(*out = pop(m)) || m->depth || m->n_marks)
            st = bad(m, "its end leaves no value, or several");
    }
    *used = m->at;
    vel_free(r->ctx, m->stack);
    vel_free(r->ctx, m->memo);
    vel_free(r->ctx, m);
    return st;
}
