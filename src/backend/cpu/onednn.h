/* onednn.h: inside the oneDNN part of the CPU backend (onednn*.c), which alone makes dnnl_ calls.
 *
 * A kernel is a program: a few primitives run one after the other (change the weight's form, the
 * product, add the residual), whose operands are slots. Everything is made when it is prepared; a
 * run only points the slots' memory objects at the launch's buffers. Builders fail softly: the
 * first failure is kept in program.status and later calls do nothing, so it is asked once.
 *
 * A frozen weight has one packed form per weight shape (a dn_form), the one that the forward
 * product likes best for the first shape that asked; every other user, the backward products too,
 * changes it into its own form in its scratch when it runs. So a model has one copy of its weights,
 * whatever is done with it. */
#ifndef VEL_ONEDNN_H
#define VEL_ONEDNN_H

#include "backend/cpu/cpu.h"
#include "backend/cpu/onednn_compat.h"

typedef struct dn_form_key {
    int kind; /* 2: the matrix of a product, 4: a convolution's */
    int dtype;
    int64_t dim[4];      /* the weight's, outermost first */
    int64_t geometry[6]; /* a convolution's stride and padding */
} dn_form_key;

typedef struct dn_form {
    struct dn_form *next;
    dn_form_key key;
    dn_desc desc; /* of dims [in, out] for a product, OIHW for a convolution */
    char *name;   /* NULL: plain, row-major */
} dn_form;

typedef struct dn_device {
    dnnl_engine_t engine;
    dnnl_stream_t stream;
    dn_form *forms;
    bool too_old; /* an x86 processor below AVX2: version 2.6's convolutions are wrong there */
} dn_device;

static inline dn_device *dn_of(const vel_device *d)
{
    return d->onednn;
}

/* DN_PAD: working memory, shared by all steps. */
enum dn_where { DN_IN, DN_OUT, DN_BUFFER, DN_PAD };
/* Whether the residual and the output are one buffer. */
enum dn_when { DN_ALWAYS, DN_ALIASED, DN_APART };
enum { DN_MAX_SLOTS = 16, DN_MAX_STEPS = 4, DN_MAX_ARGS = 8 };

typedef struct dn_slot {
    dnnl_memory_t memory;
    enum dn_where where;
    int index;     /* of the input or output */
    size_t offset; /* of a buffer in the scratch */
} dn_slot;

typedef struct dn_arg {
    int name; /* DNNL_ARG_... */
    int slot;
} dn_arg;

typedef struct dn_step {
    dnnl_primitive_t primitive;
    enum dn_when when;
    int n_args;
    dnnl_exec_arg_t args[DN_MAX_ARGS];
} dn_step;

typedef struct dn_program {
    vel_device *d;
    vel_status status;
    char name[96];
    dn_slot slots[DN_MAX_SLOTS];
    dn_step steps[DN_MAX_STEPS];
    int n_slots, n_steps;
    int residual;        /* the input that may share the output's buffer; -1 none */
    size_t buffers, pad; /* bytes of scratch: the buffers, then the working memory */
    const dn_form *form; /* of input form_input; NULL: no packed weight */
    int form_input;
    /* Before the steps, the weight is turned round into a buffer (a slot); outputs 0: it is not. */
    struct {
        int slot;
        int64_t outputs, inputs, taps;
    } turn;
} dn_program;

/* ---- programs (onednn.c) ---- */

dn_program *vel_dn_begin(vel_device *d);
/* Each gives the slot's number. */
int vel_dn_input(dn_program *p, dn_view_t desc, int input);
int vel_dn_output(dn_program *p, dn_view_t desc);
int vel_dn_buffer(dn_program *p, dn_view_t desc);
/* Takes over pd, whatever happens. */
void vel_dn_step(dn_program *p, enum dn_when when, dnnl_primitive_desc_t pd, const dn_arg *args,
                 int n);
void vel_dn_reorder(dn_program *p, enum dn_when when, dn_view_t from, int from_slot, dn_view_t to,
                    int to_slot);
void vel_dn_check(dn_program *p, dnnl_status_t s); /* keeps a failure */
/* Hands the program to the kernel, or frees it and returns why it failed. */
vel_status vel_dn_end(dn_program *p, vel_kernel *k);
void vel_dn_discard(dn_program *p);

void vel_dn_release(vel_device *d, vel_kernel *k);
vel_status vel_dn_pack(vel_device *d, const vel_kernel *k, const vel_node *n,
                       const vel_type *in_type, int input, const void *plain, void *packed);
vel_status vel_dn_run(vel_device *d, const vel_launch *launch);

/* The form known for the key; NULL when there is none yet. */
const dn_form *vel_dn_find_form(vel_device *d, const dn_form_key *key);
/* Records desc as the key's form; NULL when memory is short. */
const dn_form *vel_dn_add_form(vel_device *d, const dn_form_key *key, dn_view_t desc);
/* The plain, row-major layout of the key's weight, in the form's order of dims. */
dnnl_status_t vel_dn_plain_form(dn_desc *out, const dn_form_key *key, vel_dtype dtype);

bool vel_dn_type(vel_dtype t, dnnl_data_type_t *out); /* false: not one that we compute with */
const char *vel_dn_impl_name(const_dnnl_primitive_desc_t pd);
bool vel_dn_is_reference(const_dnnl_primitive_desc_t pd); /* oneDNN's plain loops: slow */

#endif
