/* api.c: the public functions, each a check of its arguments and one call. */
#include "params.h"

typedef vel_status (*command_fn)(vel_ctx *ctx, const vel_params *p);

/* What an earlier call said, and that it was interrupted, is over. */
static void begin(vel_ctx *ctx)
{
    ctx->error[0] = 0;
    ctx->interrupted = 0;
}

static vel_status checked(vel_ctx *ctx, const vel_params *p, const char *command, command_fn run)
{
    begin(ctx);
    VEL_TRY(vel_params_check(p, command));
    return run(ctx, p);
}

static vel_status run_train(vel_ctx *ctx, const vel_params *p)
{
    const vel_train_options *o = &p->o.train;
    return o->compare_images && o->compare_images[0] ? vel_train_compare(ctx, o, p->set)
                                                     : vel_train_run(ctx, o, p->set, NULL);
}

static vel_status run_generate(vel_ctx *ctx, const vel_params *p)
{
    return vel_generate_run(ctx, &p->o.generate);
}

static vel_status run_grid(vel_ctx *ctx, const vel_params *p)
{
    return vel_grid_run(ctx, &p->o.grid);
}

static vel_status run_score(vel_ctx *ctx, const vel_params *p)
{
    return vel_score_run(ctx, &p->o.score);
}

vel_status vel_train(vel_ctx *ctx, const vel_params *p)
{
    return checked(ctx, p, "train", run_train);
}

vel_status vel_generate(vel_ctx *ctx, const vel_params *p)
{
    return checked(ctx, p, "generate", run_generate);
}

vel_status vel_grid(vel_ctx *ctx, const vel_params *p)
{
    return checked(ctx, p, "grid", run_grid);
}

vel_status vel_score(vel_ctx *ctx, const vel_params *p)
{
    return checked(ctx, p, "score", run_score);
}

/* The text's owner is the caller, who may free it after the context is gone. */
static vel_status hand_out(vel_text *t, vel_status st, char **text)
{
    *text = NULL;
    vel_text_add(t, ""); /* an empty text is a text */
    if (t->s)
        vel_make_printable(t->s);
    if (st == VEL_OK && t->failed)
        st = VEL_NO_MEMORY;
    if (st == VEL_OK) {
        *text = vel_hand_out(t->s);
        t->s = NULL;
    }
    vel_text_finish(t);
    return st;
}

void vel_text_free(char *text)
{
    vel_free(NULL, text);
}

vel_status vel_inspect(vel_ctx *ctx, const char *path, char **text)
{
    vel_text t;
    begin(ctx);
    vel_text_init(&t, ctx);
    return hand_out(&t, vel_inspect_run(ctx, path, &t), text);
}

typedef vel_status (*telling_fn)(vel_ctx *ctx, const vel_params *p, vel_text *out);

/* A command whose result is a text. */
static vel_status tell(vel_ctx *ctx, const vel_params *p, const char *command, telling_fn run,
                       char **text)
{
    vel_text t;
    begin(ctx);
    vel_text_init(&t, ctx);
    vel_status st = vel_params_check(p, command);
    if (st == VEL_OK)
        st = run(ctx, p, &t);
    return hand_out(&t, st, text);
}

static vel_status tell_bench(vel_ctx *ctx, const vel_params *p, vel_text *out)
{
    return vel_bench_run(ctx, &p->o.bench, out);
}

static vel_status tell_checkpoint(vel_ctx *ctx, const vel_params *p, vel_text *out)
{
    return vel_checkpoint_run(ctx, &p->o.checkpoint, out);
}

static vel_status tell_adapter(vel_ctx *ctx, const vel_params *p, vel_text *out)
{
    return vel_adapter_run(ctx, &p->o.adapter, out);
}

vel_status vel_bench(vel_ctx *ctx, const vel_params *p, char **text)
{
    return tell(ctx, p, "bench", tell_bench, text);
}

vel_status vel_checkpoint_command(vel_ctx *ctx, const vel_params *p, char **text)
{
    return tell(ctx, p, "checkpoint", tell_checkpoint, text);
}

vel_status vel_adapter_command(vel_ctx *ctx, const vel_params *p, char **text)
{
    return tell(ctx, p, "adapter", tell_adapter, text);
}

vel_status vel_check_golden(vel_ctx *ctx, const char *model, const char *folder, int *passed,
                            int *failed)
{
    begin(ctx);
    *passed = *failed = 0;
    return vel_golden_run(ctx, model, folder, passed, failed);
}
