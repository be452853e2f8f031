/* regular.c: regularisation pictures as kohya's sd-scripts has them: pictures of the class, learned
 * beside the subject as further items of the epoch, in buckets of their own size, with a weight of
 * their loss. Each data set shows as many of them as pictures of the subject, repeats counted: in
 * order, each as often as its folder says, until there are enough; then round by round once more.
 * What is beyond that number is left out. */
#include "data/parts.h"

/* Items of a data set's training pictures. */
static int64_t items_of(const vel_dataset *d, int dataset)
{
    int64_t n = 0;
    for (int i = 0; i < d->n; i++)
        if (!d->samples[i].reg && !d->samples[i].held_out &&
            vel_sample_dataset(d, &d->samples[i]) == dataset)
            n += d->samples[i].repeats;
    return n;
}

/* Repeats of one data set's pictures of the class; 0 for those that are left out. */
static void settle_dataset(vel_dataset *d, int dataset)
{
    int64_t wanted = items_of(d, dataset), n = 0, used = 0;
    for (int i = 0; i < d->n; i++) {
        vel_sample *s = &d->samples[i];
        if (!s->reg || vel_sample_dataset(d, s) != dataset)
            continue;
        s->repeats = n < wanted ? s->repeats : 0;
        n += s->repeats;
        used += s->repeats > 0;
    }
    int64_t rounds = used ? VEL_MAX(0, wanted - n) / used : 0;
    int64_t rest = used ? VEL_MAX(0, wanted - n) % used : 0;
    for (int i = 0; i < d->n; i++) {
        vel_sample *s = &d->samples[i];
        if (!s->reg || !s->repeats || vel_sample_dataset(d, s) != dataset)
            continue;
        s->repeats = (int)VEL_MIN(s->repeats + rounds + (rest > 0), INT32_MAX);
        rest--;
    }
}

vel_status vel_regular_settle(vel_dataset_inner *inner)
{
    vel_dataset *d = &inner->shown;
    int datasets = 1, kept = 0, reg = 0;
    for (int i = 0; i < d->n; i++) {
        datasets = VEL_MAX(datasets, vel_sample_dataset(d, &d->samples[i]) + 1);
        reg += d->samples[i].reg;
    }
    for (int i = 0; i < datasets && reg; i++)
        settle_dataset(d, i);
    for (int i = 0; i < d->n; i++) {
        vel_sample *s = &d->samples[i];
        if (s->reg && !s->repeats)
            VEL_TRY(vel_dataset_skip(inner, s->image,
                                     "is not used: there are more pictures of the class than of "
                                     "the subject"));
        else
            d->samples[kept++] = *s;
    }
    d->n_train -= d->n - kept;
    d->n_reg = reg - (d->n - kept);
    d->n = kept;
    return VEL_OK;
}
