/* kohya_blocks.c: what sd-scripts states by block or by kind of module, in network_args or
 * block_lr, as rules of module_rank and module_lr: a pattern and its value, the first that fits
 * counts. */
#include "dialects/rules.h"

#include <stdlib.h>

enum { MOST_BLOCKS = 25, SIDE = 12, XL_SIDE = 9, XL_MIDDLE = 3 };

/* How its U-Nets are counted: ends of the network, down, middle, up, end. */
typedef struct counting {
    int first; /* before the blocks that a rate's weight is of */
    int side, middle;
    int n;
    int down, up; /* number of the first block of down_blocks and up_blocks */
} counting;
static const counting sd = {.side = SIDE, .middle = 1, .n = 25, .down = 1, .up = 13};
static const counting xl = {
    .first = 1, .side = XL_SIDE, .middle = XL_MIDDLE, .n = 23, .down = 2, .up = 13};

/* ---- the modules of a block ---- */

static void add_pattern(vel_text *t, const char *format, ...) VEL_PRINTF(2, 3);
static void add_pattern(vel_text *t, const char *format, ...)
{
    char pattern[96];
    va_list more;
    va_start(more, format);
    vsnprintf(pattern, sizeof pattern, format, more);
    va_end(more);
    vel_text_addf(t, "%s%s", t->n && t->s[t->n - 1] != ',' ? "|" : "", pattern);
}

/* Of a block in down_blocks or up_blocks: three to each, of which the last one also resizes. */
static void add_side(vel_text *t, const char *way, int k, bool convolutions)
{
    int block = k / 3, place = k % 3;
    bool down = strcmp(way, "down") == 0;
    if (!down || place < 2) {
        if (!convolutions)
            add_pattern(t, "*.%s_blocks.%d.attentions.%d.*", way, block, place);
        add_pattern(t, "*.%s_blocks.%d.resnets.%d.%s", way, block, place,
                    convolutions ? "conv?" : "*");
    }
    if (place == 2)
        add_pattern(t, "*.%s_blocks.%d.%ssamplers.*", way, block, way);
}

/* Patterns of the modules of block i; convolutions: of its 3x3 ones alone. */
static void add_block(vel_text *t, const counting *c, int i, bool convolutions)
{
    static const char *const middle[] = {"resnets.0", "attentions.0", "resnets.1"};
    const char *what = convolutions ? "conv?" : "*";
    bool large = c == &xl;
    if (i >= c->down && i < c->down + c->side - 1)
        add_side(t, "down", i - c->down, convolutions);
    else if (i >= c->up && i < c->up + c->side)
        add_side(t, "up", i - c->up, convolutions);
    else if (!large && i == c->up - 1)
        add_pattern(t, "*.mid_block.*%s", convolutions ? ".conv?" : "");
    else if (large && i >= c->up - XL_MIDDLE && i < c->up)
        add_pattern(t, "*.mid_block.%s.%s", middle[i - c->up + XL_MIDDLE], what);
    else if (large && i == 0)
        add_pattern(t, "*.time_embedding.*|*.add_embedding.*");
    else if (large && i == 1)
        add_pattern(t, "*.conv_in.*");
    else if (large && i == c->n - 1)
        add_pattern(t, "*.conv_norm_out.*|*.conv_out.*");
}

/* A rule for each value, with the blocks that have it; those of `leave` have none. */
static void add_rules(vel_text *t, const counting *c, char *const *values, bool convolutions,
                      const char *leave)
{
    for (int i = 0; i < c->n; i++) {
        bool before = strcmp(values[i], leave) == 0;
        for (int k = 0; k < i && !before; k++)
            before = strcmp(values[k], values[i]) == 0;
        if (before)
            continue;
        size_t begin = t->n;
        if (t->n)
            vel_text_add(t, ",");
        size_t from = t->n;
        for (int k = i; k < c->n; k++)
            if (strcmp(values[k], values[i]) == 0)
                add_block(t, c, k, convolutions);
        if (t->n > from) {
            vel_text_addf(t, "=%s", values[i]);
        } else if (t->s) { /* a block without modules */
            t->n = begin;
            t->s[begin] = 0;
        }
    }
}

/* ---- lists ---- */

/* The numbers of a list, as many as there may be, into out; their count, -1 for what is none.
 * blank: of a place without one. */
static int read_list(const char *text, double *out, int most, bool whole)
{
    int n = 0;
    for (const char *at = text;; at++) {
        char *end;
        double x = strtod(at, &end);
        at += strspn(at, " ");
        if (*at == ',' || !*at)
            x = 0; /* nothing between two commas */
        else if (end == at)
            return -1;
        else
            at = end + strspn(end, " ");
        if ((*at && *at != ',') || !(x >= 0 && x <= 1e6) || (whole && x != floor(x)))
            return -1;
        if (n < most)
            out[n] = x;
        n++;
        if (!*at)
            return n;
    }
}

/* "cosine+0.25": a course over the blocks of one side, and what is added to each. */
static bool read_course(const char *text, double *out, int n)
{
    static const double pi = 3.14159265358979323846;
    const char *plus = strchr(text, '+');
    size_t length = plus ? (size_t)(plus - text) : strlen(text);
    double base = plus ? atof(plus + 1) : 0;
    static const char *const names[] = {"cosine", "sine", "linear", "reverse_linear", "zeros"};
    int which = 0;
    while (which < VEL_COUNT(names) &&
           !(strlen(names[which]) == length && strncmp(names[which], text, length) == 0))
        which++;
    for (int i = 0; i < n; i++) {
        double up = (double)i / (n - 1), down = (double)(n - 1 - i) / (n - 1);
        const double course[] = {sin(pi * down / 2), sin(pi * up / 2), up, down, 0};
        out[i] = which < VEL_COUNT(names) ? course[which] + base : 0;
    }
    return which < VEL_COUNT(names);
}

/* Weights of the rate for n blocks; short lists go on with 1, long ones are cut, as there. */
static vel_status read_weights(vel_line *l, const char *key, int n, bool courses, double least,
                               double *out)
{
    const char *text = vel_rule_pair(l, "network_args", key);
    for (int i = 0; i < n; i++)
        out[i] = 1;
    if (!text)
        return VEL_OK;
    if (courses && !strchr(text, ',')) {
        if (!read_course(text, out, n))
            return vel_line_refuse(l, "network_args",
                                   "%s=%s; a list of %d numbers, or cosine, sine, linear, "
                                   "reverse_linear, zeros, each with +NUMBER behind it",
                                   key, text, n);
    } else {
        int given = read_list(text, out, n, false);
        if (given < 0)
            return vel_line_refuse(l, "network_args", "%s=%s; numbers between commas", key, text);
        if (given != n)
            vel_line_say(l, "%s has %d numbers, not %d: %s", key, given, n,
                         given < n ? "1 stands for the rest" : "the rest is not read");
    }
    for (int i = 0; i < n; i++)
        out[i] = out[i] > least ? out[i] : 0;
    return VEL_OK;
}

/* A list with a value for each block; *given: whether it is there. otherwise: of all blocks. */
static vel_status read_blocks(vel_line *l, const counting *c, const char *key, bool whole,
                              double otherwise, double *out, bool *given)
{
    const char *text = vel_rule_pair(l, "network_args", key);
    *given = text != NULL;
    for (int i = 0; i < c->n; i++)
        out[i] = otherwise;
    if (text && read_list(text, out, c->n, whole) != c->n)
        return vel_line_refuse(l, "network_args", "%s=%s; %d %s between commas are", key, text,
                               c->n, whole ? "whole numbers" : "numbers");
    return VEL_OK;
}

/* ---- networks.lora ---- */

/* Ranks and alphas of the blocks; weight 0: a block without modules. */
static vel_status block_ranks(vel_line *l, const counting *c, const double *weight, vel_text *t)
{
    double rank[MOST_BLOCKS], alpha[MOST_BLOCKS], conv[MOST_BLOCKS], conv_alpha[MOST_BLOCKS];
    bool ranks, alphas, convs, conv_alphas;
    char text[MOST_BLOCKS][64], *values[MOST_BLOCKS];
    const char *conv_dim = vel_rule_pair(l, "network_args", "conv_dim");
    const char *of_conv = vel_rule_pair(l, "network_args", "conv_alpha");
    VEL_TRY(
        read_blocks(l, c, "block_dims", true, vel_line_number(l, "network_dim", 4), rank, &ranks));
    VEL_TRY(read_blocks(l, c, "block_alphas", false, vel_line_number(l, "network_alpha", 1), alpha,
                        &alphas));
    VEL_TRY(
        read_blocks(l, c, "conv_block_dims", true, conv_dim ? atof(conv_dim) : 0, conv, &convs));
    VEL_TRY(read_blocks(l, c, "conv_block_alphas", false, of_conv ? atof(of_conv) : 1, conv_alpha,
                        &conv_alphas));
    if (!ranks && (alphas || convs || conv_alphas))
        vel_line_say(l, "block_alphas, conv_block_dims and conv_block_alphas: without block_dims "
                        "each block has --network_dim");
    for (int convolutions = convs || conv_dim; convolutions >= 0; convolutions--) {
        for (int i = 0; i < c->n; i++) {
            double r = convolutions ? conv[i] : rank[i];
            double a = convolutions ? conv_alpha[i] : alpha[i];
            values[i] = text[i];
            if (weight[i] == 0 || r == 0)
                snprintf(text[i], sizeof text[i], "0");
            else
                snprintf(text[i], sizeof text[i], "%.0f:%.10g", r, a);
        }
        add_rules(t, c, values, convolutions, "");
    }
    return VEL_OK;
}

/* Ends t: what making it came to, or the setting that it is, where there is one. */
static vel_status set_rules(vel_line *l, vel_status st, const char *flag, const char *setting,
                            vel_text *t)
{
    if (!st && t->failed)
        st = VEL_NO_MEMORY;
    if (!st && t->n)
        st = vel_line_set(l, flag, setting, "%s", t->s);
    vel_text_finish(t);
    return st;
}

static vel_status block_rules(vel_line *l)
{
    static const char *const ranks[] = {"block_dims", "block_alphas", "conv_block_dims",
                                        "conv_block_alphas"};
    static const char *const weights[] = {"down_lr_weight", "mid_lr_weight", "up_lr_weight"};
    const counting *c = l->script->bit & (SDXL_NETWORK | SDXL_TRAIN) ? &xl : &sd;
    bool by_rank = false, by_rate = false;
    for (int i = 0; i < VEL_COUNT(ranks); i++)
        by_rank |= vel_rule_pair(l, "network_args", ranks[i]) != NULL;
    for (int i = 0; i < VEL_COUNT(weights); i++)
        by_rate |= vel_rule_pair(l, "network_args", weights[i]) != NULL;
    if (!by_rank && !by_rate)
        return VEL_OK;
    const char *least = vel_rule_pair(l, "network_args", "block_lr_zero_threshold");
    double weight[MOST_BLOCKS] = {1, 1}, threshold = least ? atof(least) : 0;
    char text[MOST_BLOCKS][32], *values[MOST_BLOCKS];
    int sizes[] = {c->side, c->middle, c->side}, at = c->first;
    weight[c->n - 1] = 1;
    for (int i = 0; i < VEL_COUNT(weights); at += sizes[i++])
        VEL_TRY(read_weights(l, weights[i], sizes[i], i != 1, threshold, weight + at));
    vel_text t;
    vel_text_init(&t, l->ctx);
    VEL_TRY(set_rules(l, block_ranks(l, c, weight, &t), "network_args", "module_rank", &t));
    vel_text_init(&t, l->ctx);
    for (int i = 0; i < c->n; i++) {
        values[i] = text[i];
        snprintf(text[i], sizeof text[i], "x%.10g", weight[i] == 0 ? 1 : weight[i]);
    }
    add_rules(&t, c, values, false, "x1");
    return set_rules(l, VEL_OK, "network_args", "module_lr", &t);
}

/* ---- networks of larger families ---- */

/* Ranks by kind of module: what the module's name there contains. */
static const struct {
    uint32_t scripts;
    const char *key, *regex;
} kinds[] = {
    {FLUX_NETWORK, "img_attn_dim", "img_attn"},
    {FLUX_NETWORK, "txt_attn_dim", "txt_attn"},
    {FLUX_NETWORK, "img_mlp_dim", "img_mlp"},
    {FLUX_NETWORK, "txt_mlp_dim", "txt_mlp"},
    {FLUX_NETWORK, "img_mod_dim", "img_mod"},
    {FLUX_NETWORK, "txt_mod_dim", "txt_mod"},
    {FLUX_NETWORK, "single_dim", "single_blocks.*linear"},
    {FLUX_NETWORK, "single_mod_dim", "modulation"},
    {SD3_NETWORK, "context_attn_dim", "context_block.*attn"},
    {SD3_NETWORK, "context_mlp_dim", "context_block.*mlp"},
    {SD3_NETWORK, "context_mod_dim", "context_block.*adaLN_modulation"},
    {SD3_NETWORK, "x_attn_dim", "x_block.*attn"},
    {SD3_NETWORK, "x_mlp_dim", "x_block.*mlp"},
    {SD3_NETWORK, "x_mod_dim", "x_block.*adaLN_modulation"},
    {LUMINA_NETWORK, "attn_dim", "attention"},
    {LUMINA_NETWORK, "mlp_dim", "mlp"},
    {LUMINA_NETWORK, "mod_dim", "modulation"},
    {LUMINA_NETWORK, "refiner_dim", "refiner"},
};

static void add_rule(vel_text *t, const char *regex, const char *value)
{
    vel_text_addf(t, "%s/%s/=%s", t->n ? "," : "", regex, value);
}

/* network_reg_dims and network_reg_lrs: REGEX=VALUE between commas. */
static vel_status add_expressions(vel_line *l, const char *key, vel_text *t)
{
    const char *text = vel_rule_pair(l, "network_args", key);
    vel_span item;
    for (const char *rest = text; vel_next_item(&rest, ",", &item);) {
        char *regex = vel_arena_strndup(l->arena, item.s, item.n);
        char *equals = regex ? strchr(regex, '=') : NULL;
        if (!regex)
            return VEL_NO_MEMORY;
        if (!equals)
            return vel_line_refuse(l, "network_args", "%s=%s; REGEX=VALUE between commas are", key,
                                   text);
        *equals = 0;
        add_rule(t, regex, equals + 1);
    }
    return VEL_OK;
}

static vel_status rank_rules(vel_line *l, vel_text *t)
{
    VEL_TRY(add_expressions(l, "network_reg_dims", t));
    for (int i = 0; i < VEL_COUNT(kinds); i++) {
        const char *rank = vel_rule_pair(l, "network_args", kinds[i].key);
        if (rank && (kinds[i].scripts & l->script->bit))
            add_rule(t, kinds[i].regex, rank);
    }
    return VEL_OK;
}

static vel_status expression_rules(vel_line *l)
{
    vel_text t;
    vel_text_init(&t, l->ctx);
    VEL_TRY(set_rules(l, rank_rules(l, &t), "network_args", "module_rank", &t));
    vel_text_init(&t, l->ctx);
    return set_rules(l, add_expressions(l, "network_reg_lrs", &t), "network_args", "module_lr", &t);
}

/* A key of another family's network would change nothing there either; here it is refused. */
static vel_status check_keys(vel_line *l)
{
    static const char *const of_blocks[] = {
        "block_dims",     "block_alphas",  "conv_block_dims", "conv_block_alphas",
        "down_lr_weight", "mid_lr_weight", "up_lr_weight",    "block_lr_zero_threshold"};
    const char *wrong = NULL;
    for (int i = 0; i < VEL_COUNT(of_blocks); i++)
        if (!(l->script->bit & (TRAIN_NETWORK | SDXL_NETWORK)) &&
            vel_rule_pair(l, "network_args", of_blocks[i]))
            wrong = of_blocks[i];
    for (int i = 0; i < VEL_COUNT(kinds); i++)
        if (!(kinds[i].scripts & l->script->bit) && vel_rule_pair(l, "network_args", kinds[i].key))
            wrong = kinds[i].key;
    return wrong ? vel_line_refuse(l, "network_args", "%s is of another family's network", wrong)
                 : VEL_OK;
}

vel_status vel_kohya_ranks(vel_line *l)
{
    VEL_TRY(check_keys(l));
    VEL_TRY(block_rules(l));
    return expression_rules(l);
}

vel_status vel_kohya_block_lr(vel_line *l)
{
    const char *text = vel_line_value(l, "block_lr");
    double rate[MOST_BLOCKS];
    char words[MOST_BLOCKS][32], *values[MOST_BLOCKS];
    if (!text)
        return VEL_OK;
    if (read_list(text, rate, xl.n, false) != xl.n)
        return vel_line_refuse(l, "block_lr", "'%s'; %d rates between commas are", text, xl.n);
    for (int i = 0; i < xl.n; i++) {
        values[i] = words[i];
        snprintf(words[i], sizeof words[i], "%.10g", rate[i]);
    }
    vel_text t;
    vel_text_init(&t, l->ctx);
    add_rules(&t, &xl, values, false, "");
    return set_rules(l, VEL_OK, "block_lr", "module_lr", &t);
}
