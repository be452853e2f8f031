/* test_module_rules.c: rank, alpha and rate by module: the rules themselves, those that sd-scripts'
 * lines by block become, against its own answers for SD 1.5 and SDXL
 * (tests/golden/kohya_ranks.json, made by tools/golden/kohya_ranks.py), and what a run does with
 * them. */
#include "formats/adapter_file.h"
#include "params.h"
#include "program.h"
#include "train/session.h"

static vel_site_rules *rules_of(vel_test *t, vel_arena *a, bool rank, const char *text)
{
    vel_site_rules *r = NULL;
    REQUIRE_OK(vel_site_rules_read(t->ctx, a, rank ? "module_rank" : "module_lr", rank, text, &r));
    return r;
}

TEST(module_rules_are_read)
{
    static const struct {
        bool rank;
        const char *text, *path, *kohya;
        double value, alpha;
        bool times;
    } rows[] = {
        {true, "*.to_k=8", "unet.a.to_k", NULL, 8, 0, false},
        {true, "*.to_k=8:4,*=2", "unet.a.to_k", NULL, 8, 4, false},
        {true, "*.to_k=8:4,*=2", "unet.a.to_q", NULL, 2, 0, false},
        {true, "*.x.*|*.to_q=0", "unet.a.to_q", NULL, 0, 0, false},
        {false, "*.to_k=2e-5", "unet.a.to_k", NULL, 2e-5, 0, false},
        {false, "*.to_k=x0.5", "unet.a.to_k", NULL, 0.5, 0, true},
        {true, "/a_to_[kq]$/=3", "unet.a.to_q", "lora_unet_a_to_q", 3, 0, false},
        {true, "/a{1,2}_to=x/=5,*=7", "unet.b", "lora_unet_a_to=x", 5, 0, false}, /* ',' and '=' */
        {true, "/(a|b)_to/=5,*=7", "unet.c.to", "lora_unet_c_to", 7, 0, false},
    };
    vel_arena *a = vel_arena_create(t->ctx);
    REQUIRE(a);
    for (int i = 0; i < VEL_COUNT(rows); i++) {
        vel_site_rules *r = rules_of(t, a, rows[i].rank, rows[i].text);
        const vel_site_value *v = vel_site_rules_find(r, rows[i].path, rows[i].kohya);
        CHECK_MSG(v && v->value == rows[i].value && v->alpha == rows[i].alpha &&
                      v->times == rows[i].times,
                  "%s: %s is %g:%g", rows[i].text, rows[i].path, v ? v->value : -1,
                  v ? v->alpha : -1);
        CHECK(!vel_site_rules_find(r, "text_encoder.x", "y") || strchr(rows[i].text, ',') ||
              strchr(rows[i].text, '|'));
        vel_site_rules_destroy(r);
    }
    static const struct {
        bool rank;
        const char *text, *says;
    } wrong[] = {{true, "*.to_k", "PATTERN=RANK"}, {true, "=8", "PATTERN=RANK"},
                 {true, "*=1.5", "PATTERN=RANK"},  {true, "*=8:0", "PATTERN=RANK"},
                 {true, "*=x2", "PATTERN=RANK"},   {true, "*=8:4:2", "PATTERN=RANK"},
                 {true, "*=-1", "PATTERN=RANK"},   {true, "*=2000", "PATTERN=RANK"},
                 {false, "*=fast", "xFACTOR"},     {false, "*=1e-4:2", "xFACTOR"},
                 {true, "/a=8", "end with '/'"},   {true, "/=8", "end with '/'"},
                 {true, "/(a/=8", "no regular"},   {true, "*=8,,*=4", "PATTERN=RANK"}};
    for (int i = 0; i < VEL_COUNT(wrong); i++) {
        vel_site_rules *r = NULL;
        CHECK_MSG(vel_site_rules_read(t->ctx, a, "module", wrong[i].rank, wrong[i].text, &r) ==
                      VEL_BAD_VALUE,
                  "%s was read", wrong[i].text);
        CHECK_MSG(!r && strstr(vel_ctx_error(t->ctx), wrong[i].says), "%s: %s", wrong[i].text,
                  vel_ctx_error(t->ctx));
    }
    vel_arena_destroy(a);
}

/* ---- against sd-scripts ---- */

/* The settings that a line of a script comes to. */
static vel_params *line_of(vel_test *t, const char *script, const char *more, const json_t *args)
{
    const char *words[24] = {
        script, "--pretrained_model_name_or_path", "m", "--resolution", "64", "--seed", "1"};
    char text[16][512];
    int n = 7, i = 0;
    const char *key;
    json_t *value;
    vel_params *p = NULL;
    if (args) {
        static const char *const network[] = {
            "--network_module", "networks.lora", "--network_dim", "16", "--network_alpha", "8",
            "--network_args"};
        for (int k = 0; k < VEL_COUNT(network); k++)
            words[n++] = network[k];
        json_object_foreach ((json_t *)args, key, value) {
            snprintf(text[i], sizeof text[i], "%s=%s", key, json_string_value(value));
            words[n++] = text[i++];
        }
    } else {
        words[n++] = "--block_lr";
        words[n++] = more;
    }
    REQUIRE_OK(vel_params_parse(t->ctx, n, words, &p));
    return p;
}

typedef struct answers {
    vel_test *t;
    const char *row;
    vel_site_rules *ranks, *rates;
    double rank, alpha, conv_rank, conv_alpha; /* without rules */
} answers;

static void check_module(const answers *a, const char *path, double rank, double alpha,
                         double weight)
{
    vel_test *t = a->t;
    const vel_site_value *r = vel_site_rules_find(a->ranks, path, NULL);
    const vel_site_value *w = vel_site_rules_find(a->rates, path, NULL);
    CHECK_MSG(r && r->value == rank && (rank == 0 || r->alpha == alpha),
              "%s: %s has rank %g:%g, not %g:%g", a->row, path, r ? r->value : -1,
              r ? r->alpha : -1, rank, alpha);
    double factor = w ? w->value : 1;
    CHECK_MSG(rank == 0 || (fabs(factor - weight) < 1e-8 && (!w || w->times)),
              "%s: %s learns at %g times the rate, not %g", a->row, path, factor, weight);
}

static int check_case(vel_test *t, const json_t *row)
{
    bool sdxl = strcmp(vel_json_string(row, "family", ""), "sdxl") == 0;
    vel_arena *arena = vel_arena_create(t->ctx);
    REQUIRE(arena);
    vel_params *p = line_of(t, sdxl ? "sdxl_train_network.py" : "train_network.py", NULL,
                            json_object_get(row, "args"));
    char *args = json_dumps(json_object_get(row, "args"), 0);
    answers a = {.t = t,
                 .row = args,
                 .ranks = rules_of(t, arena, true, vel_params_get(p, "module_rank")),
                 .rates = rules_of(t, arena, false, vel_params_get(p, "module_lr"))};
    json_t *group, *name;
    size_t i, k;
    int n = 0;
    json_array_foreach (json_object_get(row, "answers"), i, group)
        json_array_foreach (group, k, name)
            if (k >= 3) {
                check_module(&a, json_string_value(name),
                             json_number_value(json_array_get(group, 0)),
                             json_number_value(json_array_get(group, 1)),
                             json_number_value(json_array_get(group, 2)));
                n++;
            }
    vel_site_rules_destroy(a.ranks);
    vel_site_rules_destroy(a.rates);
    vel_params_destroy(p);
    vel_arena_destroy(arena);
    free(args);
    return n;
}

TEST(module_rules_by_block_are_kohyas)
{
    json_t *root = NULL, *row;
    size_t i;
    int n = 0;
    REQUIRE_OK(vel_json_load(t->ctx, "tests/golden/kohya_ranks.json", &root));
    json_array_foreach (json_object_get(root, "cases"), i, row)
        n += check_case(t, row);
    CHECK_MSG(i == 10 && n > 1000, "%d", n);
    /* sdxl_train.py: each block's own rate, for weights */
    char list[256] = "", *end = list;
    for (int k = 1; k <= 23; k++)
        end += sprintf(end, "%s%d", k > 1 ? "," : "", k);
    vel_arena *arena = vel_arena_create(t->ctx);
    REQUIRE(arena);
    vel_params *p = line_of(t, "sdxl_train.py", list, NULL);
    vel_site_rules *rates = rules_of(t, arena, false, vel_params_get(p, "module_lr"));
    json_array_foreach (json_object_get(root, "block_lr"), i, row) {
        const char *path = json_string_value(json_array_get(row, 0));
        const vel_site_value *v = vel_site_rules_find(rates, path, NULL);
        double wanted = json_number_value(json_array_get(row, 1));
        CHECK_MSG(v && v->value == wanted && !v->times, "%s: %g, not %g", path, v ? v->value : -1,
                  wanted);
    }
    CHECK(i > 40);
    vel_site_rules_destroy(rates);
    vel_params_destroy(p);
    vel_arena_destroy(arena);
    json_decref(root);
}

/* ---- in a run ---- */

#define RUN                                                                                        \
    "train --model models/emoji-sd --data \"$D/p\" --resolution 64 --precision no --steps 1 "      \
    "--learning_rate 1e-2 --save_precision float --save_every 0 --overwrite --targets "            \
    "'*mid_block*attn?.to_k' --rank 4 --optimizer SGD --max_grad_norm 0 --output_dir \"$D/o\" "    \
    "--save_format kohya "

static vel_safetensors *result_of(vel_test *t, const char *name)
{
    vel_safetensors *file = NULL;
    char *path = vel_test_text(t, "%s/o/%s.safetensors", t->folder, name);
    REQUIRE_OK(vel_safetensors_open(t->ctx, path, &file));
    vel_free(t->ctx, path);
    return file;
}

#define MIDDLE "lora_unet_mid_block_attentions_0_transformer_blocks_0_"

/* The largest value of a module's up matrix, which begins at zero: after one step of SGD it is the
 * gradient times the rate. */
static double moved(vel_test *t, const vel_safetensors *file, const char *module)
{
    static float values[1 << 16];
    char name[160];
    double most = 0;
    snprintf(name, sizeof name, MIDDLE "%s.lora_up.weight", module);
    const vel_file_tensor *f = vel_safetensors_find(file, name);
    REQUIRE(f && f->count <= VEL_COUNT(values));
    vel_file_tensor_floats(f, 0, f->count, values);
    for (int64_t i = 0; i < f->count; i++)
        most = fmax(most, fabs((double)values[i]));
    return most;
}

TEST(module_rules_run)
{
    static program_result r;
    program_copy_pictures(t, vel_test_in(t, "p"), 1);
    if (!program_shell(t,
                       "$V " RUN "--output_name a >/dev/null && $V " RUN
                       "--output_name b --module_lr '*.attn1.*=x0.5,/attn2_to_k/=3e-2' && $V " RUN
                       "--output_name c --module_rank '*.attn1.*=0,*.attn2.to_k=2:3'",
                       &r))
        return;
    CHECK_MSG(r.status == 0, "%s", r.text);
    REQUIRE(r.status == 0);
    vel_safetensors *a = result_of(t, "a"), *b = result_of(t, "b"), *c = result_of(t, "c");
    CHECK(fabs(moved(t, b, "attn1_to_k") / moved(t, a, "attn1_to_k") - 0.5) < 1e-5);
    CHECK(fabs(moved(t, b, "attn2_to_k") / moved(t, a, "attn2_to_k") - 3) < 1e-5);
    CHECK(vel_safetensors_find(a, MIDDLE "attn1_to_k.alpha"));
    CHECK(!vel_safetensors_find(c, MIDDLE "attn1_to_k.alpha"));
    const vel_file_tensor *down = vel_safetensors_find(c, MIDDLE "attn2_to_k.lora_down.weight");
    const vel_file_tensor *alpha = vel_safetensors_find(c, MIDDLE "attn2_to_k.alpha");
    float value = 0;
    REQUIRE(down && alpha);
    vel_file_tensor_floats(alpha, 0, 1, &value);
    CHECK(down->dim[0] == 2 && value == 3);
    vel_safetensors_close(a);
    vel_safetensors_close(b);
    vel_safetensors_close(c);
    EXPECT(RUN "--output_name d --module_rank '*.attn3.*=2'", 1, "--module_rank", "*.attn3.*",
           "fits no module");
    EXPECT(RUN "--output_name d --module_rank '*=0'", 1, "--module_rank leaves");
    EXPECT(RUN "--output_name d --module_lr '*up_blocks*=x2'", 1, "--module_lr", "fits no module");
    EXPECT(RUN "--output_name d --module_rank '*.attn1.*=2,*.attn3.*=2' --dry_run", 0,
           "1 of 2 rules fit no module");
}
