/* launcher.c: what stands in front of a script: `accelerate launch [options]`, `python [options]`,
 * `python -m accelerate.commands.launch`. Here it starts nothing: its options are recognised, named
 * where they mean something elsewhere, and passed over. */
#include "dialects/dialects.h"

#include <stdlib.h>

typedef struct launcher_option {
    const char *name;
    bool takes_value;
    const char *note;    /* what becomes of it; NULL: nothing to say */
    const char *refused; /* why not; a value "1" is let through */
} launcher_option;

#define ONE_DEVICE "one process trains here; --gradient_accumulation_steps gives a larger batch"
static const launcher_option options[] = {
    {"mixed_precision", true, NULL, NULL}, /* read below */
    {"num_cpu_threads_per_process", true, "all cores are used; OMP_NUM_THREADS sets another number",
     NULL},
    {"num_processes", true, NULL, ONE_DEVICE},
    {"num_machines", true, NULL, ONE_DEVICE},
    {"multi_gpu", false, NULL, ONE_DEVICE},
    {"config_file", true, NULL, NULL}, /* read below */
    {"gpu_ids", true, "--device chooses the device", NULL},
    {"cpu", false, "--device cpu chooses the processor", NULL},
    {"quiet", false, NULL, NULL},
    {"debug", false, NULL, NULL},
    {"dynamo_backend", true, "nothing is compiled", NULL},
    {"dynamo_mode", true, "nothing is compiled", NULL},
    {"dynamo_use_fullgraph", false, "nothing is compiled", NULL},
    {"dynamo_use_dynamic", false, "nothing is compiled", NULL},
    {"dynamo_use_regional_compilation", false, "nothing is compiled", NULL},
    {"enable_cpu_affinity", false, "there is one process", NULL},
    {"main_process_ip", true, "there is one process", NULL},
    {"main_process_port", true, "there is one process", NULL},
    {"machine_rank", true, "there is one process", NULL},
    {"rdzv_backend", true, "there is one process", NULL},
    {"rdzv_conf", true, "there is one process", NULL},
    {"max_restarts", true, "there is one process", NULL},
    {"monitor_interval", true, "there is one process", NULL},
    {"same_network", false, "there is one process", NULL},
    {"downcast_bf16", false, NULL, "it is for TPUs"},
    {"tpu", false, NULL, "it is for TPUs"},
    {"use_deepspeed", false, NULL, ONE_DEVICE},
    {"use_fsdp", false, NULL, ONE_DEVICE},
    {"use_megatron_lm", false, NULL, ONE_DEVICE},
    {"no_python", false, NULL, "only the known scripts are run"},
    {"module", false, NULL, "only the known scripts are run"},
};

static const launcher_option *find_option(const char *word, size_t n)
{
    char plain[64];
    if (n >= sizeof plain)
        return NULL;
    for (size_t i = 0; i < n; i++)
        plain[i] = word[i] == '-' ? '_' : word[i];
    plain[n] = 0;
    for (int i = 0; i < VEL_COUNT(options); i++)
        if (strcmp(options[i].name, plain) == 0)
            return &options[i];
    return NULL;
}

static vel_status unknown_option(vel_line *l, const char *word)
{
    vel_nearest nearest = vel_nearest_to(word + strspn(word, "-"));
    for (int i = 0; i < VEL_COUNT(options); i++)
        vel_nearest_look(&nearest, options[i].name);
    return vel_fail(l->ctx, VEL_BAD_VALUE, "accelerate launch: has no option %s%s", word,
                    vel_nearest_text(&nearest, "--").s);
}

/* A line `key: value` of accelerate's own file; what it says of one process and its type counts. */
static vel_status take_setting(vel_line *l, const char *path, const char *key, char *value)
{
    static const char *const one[] = {"num_processes", "num_machines"};
    static const char *const single[] = {"NO", "No", "no", "'NO'", "\"NO\""};
    bool known = false;
    for (int i = 0; i < VEL_COUNT(one); i++)
        if (strcmp(key, one[i]) == 0 && strcmp(value, "1") != 0)
            return vel_fail(l->ctx, VEL_UNSUPPORTED, "%s: %s: %s: not available: %s", path, key,
                            value, ONE_DEVICE);
    for (int i = 0; i < VEL_COUNT(single); i++)
        known |= strcmp(value, single[i]) == 0;
    if (strcmp(key, "distributed_type") == 0 && !known)
        return vel_fail(l->ctx, VEL_UNSUPPORTED, "%s: %s: %s: not available: %s", path, key, value,
                        ONE_DEVICE);
    if (strcmp(key, "mixed_precision") != 0 || l->launcher_precision)
        return VEL_OK;
    value += strspn(value, "'\"");
    value[strcspn(value, "'\"")] = 0;
    l->launcher_precision = vel_arena_strdup(l->arena, value);
    return l->launcher_precision ? VEL_OK : VEL_NO_MEMORY;
}

/* accelerate's YAML: its settings stand one a line; what is indented belongs to plug-ins. */
static vel_status read_config(vel_line *l, const char *path)
{
    char *text = NULL;
    size_t n;
    VEL_TRY(vel_read_file(l->ctx, path, (size_t)1 << 20, &text, &n));
    vel_status st = VEL_OK;
    for (char *at = text, *next; at && *at && st == VEL_OK; at = next) {
        next = strchr(at, '\n');
        if (next)
            *next++ = 0;
        at[strcspn(at, "#\r")] = 0;
        char *colon = strchr(at, ':');
        if (!colon || at[0] == ' ' || at[0] == '-')
            continue;
        *colon = 0;
        char *value = colon + 1 + strspn(colon + 1, " ");
        for (size_t k = strlen(value); k && value[k - 1] == ' '; k--)
            value[k - 1] = 0;
        st = take_setting(l, path, at, value);
    }
    vel_free(l->ctx, text);
    return st;
}

static vel_status take_option(vel_line *l, int n, const char *const *words, int *taken)
{
    const char *word = words[0], *name = word + strspn(word, "-"), *equals = strchr(name, '=');
    size_t length = equals ? (size_t)(equals - name) : strlen(name);
    if (strcmp(word, "-m") == 0)
        return vel_fail(l->ctx, VEL_UNSUPPORTED,
                        "accelerate launch: -m: only the known scripts are run, by their file's "
                        "name");
    const launcher_option *o = vel_has_prefix(word, "--") ? find_option(name, length) : NULL;
    if (!o)
        return unknown_option(l, word);
    const char *value = equals ? equals + 1 : NULL;
    *taken = 1;
    if (o->takes_value && !value) {
        if (n < 2)
            return vel_fail(l->ctx, VEL_BAD_VALUE, "accelerate launch: --%s wants a value",
                            o->name);
        value = words[1];
        *taken = 2;
    }
    if (o->refused && !(value && strcmp(value, "1") == 0))
        return vel_fail(l->ctx, VEL_UNSUPPORTED, "accelerate launch: --%s: not available: %s",
                        o->name, o->refused);
    if (o->note)
        vel_log(l->ctx, 2, "accelerate launch: --%s changes nothing here: %s", o->name, o->note);
    if (strcmp(o->name, "mixed_precision") == 0)
        l->launcher_precision = value;
    return strcmp(o->name, "config_file") == 0 ? read_config(l, value) : VEL_OK;
}

/* Scripts of the same peers that are not run here: what they train, and the nearest that is run. */
static const struct {
    const char *names, *what, *nearest;
} others[] = {
    {"*controlnet*,*control_net*,train_control_*,*t2i_adapter*,*lllite*",
     "networks that steer a model are not trained", "train_dreambooth_lora_flux.py"},
    {"*instruct_pix2pix*,*kontext*,*img2img*,*inpaint*",
     "models that edit pictures are not trained", "train_dreambooth_lora_flux.py"},
    {"*_lcm_*,*distill*,*turbo*", "models are not distilled", "train_text_to_image_lora_sdxl.py"},
    {"*custom_diffusion*", "its method is not there", "train_dreambooth.py"},
    {"*_XTI.py", "its method is not there", "train_textual_inversion.py"},
    {"textual_inversion_flax.py", "the same flags without JAX", "textual_inversion.py"},
    {"train_dreambooth_flax.py", "the same flags without JAX", "train_dreambooth.py"},
    {"train_text_to_image_flax.py", "the same flags without JAX", "train_text_to_image.py"},
    {"hunyuan_image_*,anima_*,*chroma*", "no model of its family is known",
     "flux_train_network.py"},
    {"train_dreambooth_lora_*", "no model of its family is known", "train_dreambooth_lora_flux.py"},
    {"*gen_img*,*_inference.py", "pictures are drawn with `velatura generate`", NULL},
    {"*extract_lora*,merge_*,*_merge_*,resize_lora.py,lora_interrogator.py",
     "`velatura adapter` merges, extracts and resizes", NULL},
    {"train_unconditional.py", "models without text are not trained", "train_text_to_image.py"},
};

static vel_status not_a_script(vel_line *l, const char *word)
{
    const char *name = vel_file_name(word);
    vel_nearest nearest = vel_nearest_to(name);
    for (int i = 0; i < VEL_COUNT(others); i++)
        if (vel_glob(others[i].names, name))
            return vel_fail(l->ctx, VEL_UNSUPPORTED, "%s: is not run here: %s%s%s", word,
                            others[i].what, others[i].nearest ? "; the nearest script is " : "",
                            others[i].nearest ? others[i].nearest : "");
    for (const vel_script *s = vel_scripts; s->name; s++)
        vel_nearest_look(&nearest, s->name);
    return vel_fail(l->ctx, VEL_UNSUPPORTED,
                    "%s: is none of the known scripts, which `velatura help --dialects` lists%s",
                    word, vel_nearest_text(&nearest, "").s);
}

static vel_status at_script(vel_line *l, int n, const char *const *words, int at, int *out)
{
    *out = at;
    if (at >= n)
        return vel_fail(l->ctx, VEL_BAD_VALUE, "no script is named, such as train_network.py");
    return vel_script_find(words[at]) ? VEL_OK : not_a_script(l, words[at]);
}

static vel_status skip_launch(vel_line *l, int n, const char *const *words, int at, int *out)
{
    for (int taken = 1; at < n && words[at][0] == '-'; at += taken)
        VEL_TRY(take_option(l, n - at, words + at, &taken));
    return at_script(l, n, words, at, out);
}

/* Python's own options: of those that take a value in the next word, none is needed here. */
static vel_status skip_python(vel_line *l, int n, const char *const *words, int *out)
{
    int at = 1;
    while (at < n && words[at][0] == '-') {
        const char *word = words[at];
        bool module = strcmp(word, "-m") == 0 && at + 1 < n;
        if (module && vel_has_prefix(words[at + 1], "accelerate.commands.launch"))
            return skip_launch(l, n, words, at + 2, out);
        if (module && strcmp(words[at + 1], "accelerate.commands.accelerate_cli") == 0 &&
            at + 2 < n && strcmp(words[at + 2], "launch") == 0)
            return skip_launch(l, n, words, at + 3, out);
        if (strcmp(word, "-m") == 0 || strcmp(word, "-c") == 0)
            return vel_fail(l->ctx, VEL_UNSUPPORTED,
                            "python %s: only the known scripts are run, by their file's name",
                            word);
        at += strcmp(word, "-W") == 0 || strcmp(word, "-X") == 0 ? 2 : 1;
    }
    return at_script(l, n, words, at, out);
}

vel_status vel_launcher_skip(vel_line *l, int n, const char *const *words, int *at)
{
    const char *first = n ? vel_file_name(words[0]) : "";
    if (vel_has_prefix(first, "python") && !vel_has_suffix(first, ".py"))
        return skip_python(l, n, words, at);
    if (strcmp(first, "accelerate-launch") == 0)
        return skip_launch(l, n, words, 1, at);
    if (strcmp(first, "accelerate") != 0)
        return at_script(l, n, words, 0, at);
    if (n < 2 || strcmp(words[1], "launch") != 0)
        return vel_fail(l->ctx, VEL_UNSUPPORTED,
                        "accelerate %s: only `accelerate launch SCRIPT.py --flags` is known; "
                        "there is nothing to set up",
                        n > 1 ? words[1] : "");
    return skip_launch(l, n, words, 2, at);
}
