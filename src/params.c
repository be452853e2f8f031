/* params.c: finding, setting and checking the rows of the one option table (params_train.c,
 * params_draw.c). A row feeds the parser, --help, the settings written into a report, the digest of
 * a resume, and vel_params_set. */
#include <errno.h>
#include <stdlib.h>

#include "params_rows.h"

static const struct {
    const char *name;
    const vel_option_row *rows;
    const char *required; /* comma separated */
} commands[] = {
    {"train", vel_train_rows, "model,data"},
    {"generate", vel_generate_rows, "model"},
    {"grid", vel_grid_rows, "model"},
    {"score", vel_score_rows, "model,data"},
    {"bench", vel_bench_rows, ""},
    {"checkpoint", vel_checkpoint_rows, "input,output"},
    {"adapter", vel_adapter_rows, "what,input,second"},
};

/* ---- finding and setting --------------------------------------------------------------------- */

static int find_command(const char *name)
{
    for (int i = 0; i < VEL_COUNT(commands); i++)
        if (strcmp(commands[i].name, name) == 0)
            return i;
    return -1;
}

/* '-' and '_' are the same in names. An exact name or alias, else a unique beginning of a name. */
static const vel_option_row *find_row(const vel_option_row *rows, const char *name)
{
    char plain[128];
    size_t n = strlen(name);
    if (n >= sizeof plain)
        return NULL;
    for (size_t i = 0; i <= n; i++)
        plain[i] = name[i] == '-' ? '_' : name[i];
    const vel_option_row *begins = NULL;
    int n_begin = 0;
    for (const vel_option_row *r = rows; r->name; r++) {
        if (strcmp(r->name, plain) == 0 || vel_list_has(r->aliases, plain))
            return r;
        if (strncmp(r->name, plain, n) == 0) {
            begins = r;
            n_begin++;
        }
    }
    return n_begin == 1 ? begins : NULL;
}

static bool parse_flag(const char *value, bool *out)
{
    static const char *const yes = "yes,true,1,on,True", *const no = "no,false,0,off,False";
    if (!value[0] || vel_list_has(yes, value))
        *out = true;
    else if (vel_list_has(no, value))
        *out = false;
    else
        return false;
    return true;
}

static vel_status set_number(vel_params *p, const vel_option_row *r, void *field, const char *value)
{
    char *end;
    errno = 0;
    double x = strtod(value, &end);
    while (*end == ' ')
        end++;
    bool whole = r->type == OPT_FLOAT || x == floor(x);
    if (end == value || *end || !isfinite(x) || !whole ||
        ((r->min || r->max) && (x < r->min || x > r->max)))
        return vel_fail(p->ctx, VEL_BAD_VALUE, "--%s: '%s' is not %s from %g to %g", r->name, value,
                        r->type == OPT_INT ? "a whole number" : "a number", r->min, r->max);
    if (r->type == OPT_FLOAT)
        *(double *)field = x;
    else if (r->size == 8)
        *(int64_t *)field = (int64_t)x;
    else
        *(int *)field = (int)x;
    return VEL_OK;
}

static vel_status keep_text(vel_params *p, const char *value, const char **field)
{
    VEL_TRY(vel_grow(p->ctx, &p->owned, (size_t)p->n_owned + 1));
    char *copy = vel_strdup(p->ctx, value);
    if (!copy)
        return VEL_NO_MEMORY;
    p->owned[p->n_owned++] = copy;
    *field = copy;
    return VEL_OK;
}

static bool is_choice(const vel_option_row *r, const char *value)
{
    if (vel_list_has(r->choices, value))
        return true;
    vel_span ending;
    for (const char *rest = r->endings; vel_next_item(&rest, ",", &ending);) {
        size_t n = strlen(value), stem = n - ending.n;
        char name[64];
        if (n > ending.n && stem < sizeof name && strncmp(value + stem, ending.s, ending.n) == 0) {
            snprintf(name, sizeof name, "%.*s", (int)stem, value);
            return vel_list_has(r->choices, name);
        }
    }
    return false;
}

static vel_status refuse_choice(vel_params *p, const vel_option_row *r, const char *value)
{
    vel_nearest nearest = vel_nearest_to(value);
    vel_span choice;
    vel_arena *a = vel_arena_create(p->ctx);
    for (const char *rest = r->choices; a && vel_next_item(&rest, ",", &choice);) {
        const char *name = vel_arena_strndup(a, choice.s, choice.n);
        if (name)
            vel_nearest_look(&nearest, name);
    }
    vel_status st = vel_fail(p->ctx, VEL_BAD_VALUE, "--%s: '%s' is not one of %s%s%s%s", r->name,
                             value, r->choices, r->endings ? "; endings: " : "",
                             r->endings ? r->endings : "", vel_nearest_text(&nearest, "").s);
    vel_arena_destroy(a);
    return st;
}

static vel_status set_row(vel_params *p, const vel_option_row *r, const char *value)
{
    void *field = (char *)&p->o + r->offset;
    bool flag;
    switch (r->type) {
    case OPT_INT:
    case OPT_FLOAT:
        VEL_TRY(set_number(p, r, field, value));
        break;
    case OPT_FLAG:
        if (!parse_flag(value, &flag))
            return vel_fail(p->ctx, VEL_BAD_VALUE, "--%s: '%s' is neither yes nor no", r->name,
                            value);
        *(bool *)field = flag;
        break;
    case OPT_CHOICE:
        if (!is_choice(r, value))
            return refuse_choice(p, r, value);
        VEL_TRY(keep_text(p, value, field));
        break;
    case OPT_TEXT:
        VEL_TRY(keep_text(p, value, field));
        break;
    }
    json_t *text =
        r->type == OPT_FLAG ? json_string(*(bool *)field ? "yes" : "no") : json_string(value);
    if (!text)
        return vel_fail(p->ctx, VEL_BAD_VALUE, "--%s: the value is not valid UTF-8", r->name);
    json_object_set_new(p->set, r->name, text);
    return VEL_OK;
}

/* ---- the public face ------------------------------------------------------------------------- */

vel_params *vel_params_create(vel_ctx *ctx, const char *command)
{
    int row = find_command(command);
    if (row < 0) {
        vel_fail(ctx, VEL_BAD_VALUE, "there is no command '%s' with settings", command);
        return NULL;
    }
    vel_params *p = vel_alloc(ctx, sizeof *p);
    if (!p)
        return NULL;
    p->ctx = ctx;
    p->command = row;
    p->set = json_object();
    for (const vel_option_row *r = commands[row].rows; r->name; r++)
        if (!p->set || (r->initial && set_row(p, r, r->initial))) {
            vel_params_destroy(p);
            return NULL;
        }
    return p;
}

void vel_params_destroy(vel_params *p)
{
    if (!p)
        return;
    for (int i = 0; i < p->n_owned; i++)
        vel_free(p->ctx, p->owned[i]);
    vel_free(p->ctx, p->owned);
    json_decref(p->set);
    vel_free(p->ctx, p);
}

/* What a --dataset_config says of the whole run; its subsets are read when the data are. */
static vel_status load_dataset_config(vel_params *p, const char *path)
{
    vel_dataset_config config;
    vel_arena *a = vel_arena_create(p->ctx);
    vel_status st = a ? vel_dataset_config_read(p->ctx, path, NULL, a, &config) : VEL_NO_MEMORY;
    for (int i = 0; st == VEL_OK && i < config.n_settings; i++) {
        st = vel_params_set(p, config.setting[i].name, config.setting[i].value);
        if (st)
            vel_fail_in(p->ctx, st, "%s", path);
    }
    if (st == VEL_OK && config.subsets[0].width) {
        char size[64];
        snprintf(size, sizeof size, "%d,%d", config.subsets[0].width, config.subsets[0].height);
        st = vel_params_set(p, "resolution", size);
    }
    vel_arena_destroy(a);
    return st || vel_params_get(p, "data") ? st : vel_params_set(p, "data", path);
}

vel_status vel_params_set(vel_params *p, const char *name, const char *value)
{
    const vel_option_row *rows = commands[p->command].rows, *r = find_row(rows, name);
    if (r && value && strcmp(r->name, "dataset_config") == 0)
        VEL_TRY(load_dataset_config(p, value));
    if (r)
        return set_row(p, r, value ? value : "");
    vel_nearest nearest = vel_nearest_to(name);
    for (r = rows; r->name; r++)
        vel_nearest_look(&nearest, r->name);
    return vel_fail(p->ctx, VEL_BAD_VALUE, "%s: no setting --%s%s", commands[p->command].name, name,
                    vel_nearest_text(&nearest, "--").s);
}

const char *vel_params_get(const vel_params *p, const char *name)
{
    const vel_option_row *r = find_row(commands[p->command].rows, name);
    return r ? json_string_value(json_object_get(p->set, r->name)) : NULL;
}

static vel_param_info info_of(const vel_option_row *r)
{
    static const char *const types[] = {"text", "int", "float", "flag", "choice"};
    return (vel_param_info){r->name,  types[r->type], r->initial, r->choices,
                            r->group, r->help,        r->aliases};
}

bool vel_params_describe(const char *command, int i, vel_param_info *out)
{
    int row = find_command(command);
    for (const vel_option_row *r = row < 0 ? NULL : commands[row].rows; r && r->name; r++)
        if (i-- == 0) {
            *out = info_of(r);
            return true;
        }
    return false;
}

bool vel_params_find(const char *command, const char *name, vel_param_info *out)
{
    int row = find_command(command);
    const vel_option_row *r = row < 0 ? NULL : find_row(commands[row].rows, name);
    if (r)
        *out = info_of(r);
    return r;
}

static vel_status load_value(vel_params *p, const char *path, const char *key, const json_t *value)
{
    char text[64];
    const char *word = text;
    if (json_is_string(value))
        word = json_string_value(value);
    else if (json_is_integer(value))
        snprintf(text, sizeof text, "%" PRId64, (int64_t)json_integer_value(value));
    else if (json_is_real(value))
        snprintf(text, sizeof text, "%.17g", json_real_value(value));
    else if (json_is_boolean(value))
        word = json_is_true(value) ? "yes" : "no";
    else
        return vel_fail(p->ctx, VEL_BAD_VALUE, "%s: %s: is no text, number, true or false", path,
                        key);
    const vel_option_row *r = find_row(commands[p->command].rows, key);
    bool flag = r && r->type == OPT_FLAG;
    if (r && flag != json_is_boolean(value) && !json_is_string(value))
        return vel_fail(p->ctx, VEL_BAD_VALUE, "%s: %s: wants %s", path, key,
                        flag ? "true or false" : "no truth value");
    vel_status st = vel_params_set(p, key, word);
    return st ? vel_fail_in(p->ctx, st, "%s", path) : VEL_OK;
}

static vel_status load_all(vel_params *p, const char *path, json_t *root)
{
    const char *key, *inner;
    json_t *value, *below;
    json_object_foreach (root, key, value) {
        if (!json_is_object(value)) {
            VEL_TRY(load_value(p, path, key, value));
            continue;
        }
        json_object_foreach (value, inner, below)
            VEL_TRY(load_value(p, path, inner, below));
    }
    return VEL_OK;
}

vel_status vel_params_load(vel_params *p, const char *path)
{
    json_t *root = NULL;
    if (vel_has_suffix(path, ".json"))
        VEL_TRY(vel_json_load(p->ctx, path, &root));
    else
        VEL_TRY(vel_toml_load(p->ctx, path, &root));
    vel_status st = json_is_object(root)
                        ? load_all(p, path, root)
                        : vel_fail(p->ctx, VEL_BAD_FILE, "%s: is no table of settings", path);
    json_decref(root);
    return st;
}

/* Of files in OUTPUT_DIR, which have an ending behind it. */
static vel_status check_output_name(const vel_params *p)
{
    const char *name = p->o.train.output_name;
    bool control = false;
    for (const char *c = name; *c; c++)
        control = control || (uint8_t)*c < ' ' || *c == 0x7f;
    if (strcmp(name, ".") == 0 && strcmp(p->o.train.method, "full") != 0)
        return vel_fail(p->ctx, VEL_BAD_VALUE,
                        "--output_name: '.' is OUTPUT_DIR itself, which only a model (--method "
                        "full) can be");
    if (strpbrk(name, "/\\") || strcmp(name, "..") == 0)
        return vel_fail(p->ctx, VEL_BAD_VALUE,
                        "--output_name: '%s' is a name, not a path; use --output_dir", name);
    if (!*name || control)
        return vel_fail(p->ctx, VEL_BAD_VALUE, "--output_name: '%s' is no name of a file", name);
    return VEL_OK;
}

vel_status vel_params_check(const vel_params *p, const char *command)
{
    if (strcmp(commands[p->command].name, command) != 0)
        return vel_fail(p->ctx, VEL_BAD_VALUE, "these are settings of %s, not of %s",
                        commands[p->command].name, command);
    const char *required = commands[p->command].required;
    for (const vel_option_row *r = commands[p->command].rows; r->name; r++)
        if (vel_list_has(required, r->name) && !vel_params_get(p, r->name))
            return vel_fail(p->ctx, VEL_BAD_VALUE, "%s needs --%s: %s", commands[p->command].name,
                            r->name, r->help);
    if (p->command == 0 && p->o.train.min_timestep >= p->o.train.max_timestep)
        return vel_fail(p->ctx, VEL_BAD_VALUE, "--min_timestep %d is not below --max_timestep %d",
                        p->o.train.min_timestep, p->o.train.max_timestep);
    return p->command == 0 ? check_output_name(p) : VEL_OK;
}
