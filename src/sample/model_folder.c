/* model_folder.c: from the name a user gives to a folder on this machine. A name such as
 * "owner/name" is looked for where it may have been placed, and in the Hugging Face cache as other
 * programs left it there; nothing is ever fetched. */
#include <stdlib.h>
#include <sys/stat.h>

#include "sample/model.h"

/* "owner/name", with the characters that the hub allows. */
static bool is_hub_name(const char *s)
{
    int slashes = 0;
    for (const char *c = s; *c; c++) {
        bool plain =
            (*c >= 'a' && *c <= 'z') || (*c >= 'A' && *c <= 'Z') || (*c >= '0' && *c <= '9');
        bool start = c == s || c[-1] == '/';
        if (*c == '/')
            slashes++;
        else if (!plain && (start || !strchr("._-", *c)))
            return false;
    }
    size_t n = strlen(s);
    return slashes == 1 && s[0] != '/' && s[n - 1] != '/';
}

static bool has_index(vel_ctx *ctx, const char *folder)
{
    char *path = vel_path_join(ctx, folder, "model_index.json");
    bool yes = path && vel_is_file(path);
    vel_free(ctx, path);
    return yes;
}

/* Takes path: *out, when it is a model's folder, else freed. */
static bool accept(vel_ctx *ctx, char *path, char **out)
{
    if (path && has_index(ctx, path)) {
        *out = path;
        return true;
    }
    vel_free(ctx, path);
    return false;
}

/* The hub cache's folder, by the variables that huggingface_hub reads; owned, NULL without a home.
 */
static char *hub_cache(vel_ctx *ctx)
{
    static const struct {
        const char *variable, *below;
    } places[] = {
        {"HF_HUB_CACHE", ""},
        {"HUGGINGFACE_HUB_CACHE", ""},
        {"HF_HOME", "/hub"},
        {"XDG_CACHE_HOME", "/huggingface/hub"},
        {"HOME", "/.cache/huggingface/hub"},
    };
    for (int i = 0; i < VEL_COUNT(places); i++) {
        const char *value = getenv(places[i].variable);
        if (value && value[0])
            return vel_strf(ctx, "%s%s", value, places[i].below);
    }
    return NULL;
}

/* The snapshot that refs/main names; NULL when there is none. */
static char *main_snapshot(vel_ctx *ctx, const char *repository)
{
    char *path = vel_strf(ctx, "%s/refs/main", repository), *text = NULL, *out = NULL;
    size_t n = 0;
    if (path && vel_is_file(path) && !vel_read_file(ctx, path, 256, &text, &n)) {
        text[strcspn(text, " \t\r\n/")] = 0;
        if (text[0] && text[0] != '.')
            out = vel_strf(ctx, "%s/snapshots/%s", repository, text);
    }
    vel_free(ctx, text);
    vel_free(ctx, path);
    return out;
}

static char *newest_snapshot(vel_ctx *ctx, const char *repository)
{
    char *folder = vel_strf(ctx, "%s/snapshots", repository), *best = NULL, **names = NULL;
    int n = 0;
    struct timespec newest = {0};
    if (folder && vel_is_folder(folder) && !vel_list_folder(ctx, folder, &names, &n)) {
        for (int i = 0; i < n; i++) {
            char *path = vel_path_join(ctx, folder, names[i]);
            struct stat s;
            bool later =
                path && has_index(ctx, path) && !stat(path, &s) &&
                (!best || s.st_mtim.tv_sec > newest.tv_sec ||
                 (s.st_mtim.tv_sec == newest.tv_sec && s.st_mtim.tv_nsec > newest.tv_nsec));
            if (later) {
                vel_free(ctx, best);
                best = path;
                newest = s.st_mtim;
            } else {
                vel_free(ctx, path);
            }
        }
        vel_names_free(ctx, names, n);
    }
    vel_free(ctx, folder);
    return best;
}

static bool find_in_hub_cache(vel_ctx *ctx, const char *name, const char *cache, char **out)
{
    const char *slash = strchr(name, '/');
    char *repository =
        vel_strf(ctx, "%s/models--%.*s--%s", cache, (int)(slash - name), name, slash + 1);
    bool found = repository && (accept(ctx, main_snapshot(ctx, repository), out) ||
                                accept(ctx, newest_snapshot(ctx, repository), out));
    vel_free(ctx, repository);
    return found;
}

static vel_status find_by_hub_name(vel_ctx *ctx, const char *name, char **out)
{
    const char *root = getenv("VELATURA_MODEL_ROOT");
    if (root && root[0] &&
        (accept(ctx, vel_path_join(ctx, root, name), out) ||
         accept(ctx, vel_path_join(ctx, root, strchr(name, '/') + 1), out)))
        return VEL_OK;
    char *cache = hub_cache(ctx);
    vel_status st = VEL_OK;
    if (!cache || !find_in_hub_cache(ctx, name, cache, out))
        st = vel_fail(
            ctx, VEL_NOT_FOUND,
            "model '%s': there is no such folder, and the name is kept neither under "
            "VELATURA_MODEL_ROOT (%s) nor in the Hugging Face cache (%s). Nothing is downloaded: "
            "place the diffusers folder (model_index.json, unet, vae, text_encoder, tokenizer, "
            "scheduler) at $VELATURA_MODEL_ROOT/%s, or give its path",
            name, root && root[0] ? root : "not set", cache ? cache : "no home folder", name);
    vel_free(ctx, cache);
    return st;
}

vel_status vel_model_find_folder(vel_ctx *ctx, const char *name, char **out)
{
    *out = NULL;
    if (!name || !name[0])
        return vel_fail(ctx, VEL_BAD_VALUE, "model: no folder given");
    if (vel_is_folder(name) || vel_is_file(name)) {
        *out = vel_strdup(ctx, name);
        return *out ? VEL_OK : VEL_NO_MEMORY;
    }
    if (!is_hub_name(name))
        return vel_fail(ctx, VEL_NOT_FOUND, "%s: there is no such model folder or file", name);
    return find_by_hub_name(ctx, name, out);
}

/* ---- the tokenizers of a single file ---- */

static bool has_words(vel_ctx *ctx, const char *folder)
{
    static const char *const files[] = {"tokenizer.json", "vocab.json", "spiece.model",
                                        "tokenizer.model"};
    bool found = false;
    for (int i = 0; i < VEL_COUNT(files) && !found; i++) {
        char *path = vel_path_join(ctx, folder, files[i]);
        found = path && vel_is_file(path);
        vel_free(ctx, path);
    }
    return found;
}

/* The folder `tokenizer` in folder; or, itself, folder. */
static bool take_tokenizer(vel_ctx *ctx, const char *folder, const char *tokenizer, bool itself,
                           char **out)
{
    char *inner = vel_path_join(ctx, folder, tokenizer);
    bool in_it = inner && has_words(ctx, inner);
    if (in_it || (itself && has_words(ctx, folder))) {
        *out = in_it ? inner : vel_strdup(ctx, folder);
        if (!in_it)
            vel_free(ctx, inner);
        return *out != NULL;
    }
    vel_free(ctx, inner);
    return false;
}

/* Models that have the tokenizers of a family, as they are named where they are published. */
static const struct {
    const char *family;
    bool second; /* Stable Diffusion 2.x */
    const char *models[3];
} published[] = {
    {"sd",
     false,
     {"stable-diffusion-v1-5/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5",
      "CompVis/stable-diffusion-v1-4"}},
    {"sd",
     true,
     {"stabilityai/stable-diffusion-2-1", "stabilityai/stable-diffusion-2",
      "stabilityai/stable-diffusion-2-base"}},
    {"sdxl", false, {"stabilityai/stable-diffusion-xl-base-1.0"}},
    {"sd3",
     false,
     {"stabilityai/stable-diffusion-3-medium-diffusers", "stabilityai/stable-diffusion-3.5-medium",
      "stabilityai/stable-diffusion-3.5-large"}},
    {"flux", false, {"black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell"}},
    {"lumina2", false, {"Alpha-VLLM/Lumina-Image-2.0"}},
};

static bool find_published(vel_ctx *ctx, const char *family, bool second, const char *tokenizer,
                           char **out)
{
    for (int i = 0; i < VEL_COUNT(published); i++) {
        if (strcmp(published[i].family, family) != 0 || published[i].second != second)
            continue;
        for (int k = 0; k < VEL_COUNT(published[i].models) && published[i].models[k]; k++) {
            char *folder = NULL;
            bool found = !vel_model_find_folder(ctx, published[i].models[k], &folder) &&
                         take_tokenizer(ctx, folder, tokenizer, false, out);
            vel_free(ctx, folder);
            if (found)
                return true;
        }
    }
    return false;
}

vel_status vel_model_find_tokenizer(vel_model *m, int k, const char *named, char **out)
{
    vel_ctx *ctx = m->ctx;
    const char *file = m->folder, *tokenizer = m->texts[k].tokenizer;
    bool second = strcmp(m->family->name, "sd") == 0 && m->texts[0].width == 1024;
    char *folder = NULL; /* 2.x as diffusers tells it */
    *out = NULL;
    if (named) {
        VEL_TRY(vel_model_find_folder(ctx, named, &folder));
        bool found = take_tokenizer(ctx, folder, tokenizer, m->n_texts == 1, out);
        vel_free(ctx, folder);
        return found ? VEL_OK
                     : vel_fail(ctx, VEL_NOT_FOUND,
                                "%s: no tokenizer.json, vocab.json, spiece.model or "
                                "tokenizer.model in its folder %s/%s",
                                named, tokenizer, m->n_texts == 1 ? " or itself" : "");
    }
    const char *slash = strrchr(file, '/'), *root = getenv("VELATURA_MODEL_ROOT");
    folder = slash ? vel_strndup(ctx, file, (size_t)(slash - file)) : vel_strdup(ctx, ".");
    bool found = folder && take_tokenizer(ctx, folder, tokenizer, k == 0, out);
    vel_free(ctx, folder);
    if (!found && root && root[0])
        found = take_tokenizer(ctx, root, tokenizer, k == 0, out);
    if (found || find_published(ctx, m->family->name, second, tokenizer, out))
        return VEL_OK;
    return vel_fail(ctx, VEL_NOT_FOUND,
                    "%s: a single file holds no tokenizer. Place the folder %s/ of a %s%s model "
                    "(tokenizer.json, or vocab.json and merges.txt, or spiece.model, "
                    "with tokenizer_config.json) beside it or at $VELATURA_MODEL_ROOT/%s, or name "
                    "the folder that it lies in with --tokenizer",
                    file, tokenizer, m->family->title, second ? " (2.x)" : "", tokenizer);
}
