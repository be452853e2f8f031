/* ahead.c: items made by threads ahead of who takes them: a bounded ring. Threads claim the items
 * in order, each into slot (i - first) % slots, once that slot is free; the taker waits for its
 * item and gives the slot before it free. An item that failed is kept with its message until it is
 * its turn, so that what a run says does not depend on how far ahead its threads were. */
#include "base/base.h"

#include <pthread.h>
#include <signal.h>

typedef struct ahead_slot {
    bool ready; /* made and not yet given free */
    vel_status status;
    char error[VEL_LONGEST_ERROR];
} ahead_slot;

typedef struct ahead_thread {
    vel_ahead *a;
    int number;
    pthread_t id;
} ahead_thread;

struct vel_ahead {
    vel_ctx *ctx;
    vel_ahead_how how;
    ahead_thread *thread;
    int n_started;
    ahead_slot *slot;
    pthread_mutex_t lock;
    pthread_cond_t made, freed;
    /* under the lock */
    bool stopping;
    int64_t claimed; /* the next that a thread begins with */
    int64_t taken;   /* the next that will be taken; the one before it is in use */
};

static ahead_slot *slot_of(vel_ahead *a, int64_t i)
{
    return &a->slot[(i - a->how.first) % a->how.slots];
}

/* Is the slot for item i free? Of the items before it the last taken one may still be in use. */
static bool has_room(const vel_ahead *a, int64_t i)
{
    int64_t in_use = a->taken > a->how.first ? a->taken - 1 : a->taken;
    return i - in_use < a->how.slots;
}

static void *work(void *given)
{
    ahead_thread *t = given;
    vel_ahead *a = t->a;
    char error[VEL_LONGEST_ERROR] = "";
    vel_keep_errors(error);
    pthread_mutex_lock(&a->lock);
    while (!a->stopping && a->claimed < a->how.end) {
        if (!has_room(a, a->claimed)) {
            pthread_cond_wait(&a->freed, &a->lock);
            continue;
        }
        int64_t i = a->claimed++;
        pthread_mutex_unlock(&a->lock);
        int slot = (int)((i - a->how.first) % a->how.slots);
        vel_status status = a->how.make(a->how.user, t->number, i, slot);
        pthread_mutex_lock(&a->lock);
        ahead_slot *s = &a->slot[slot];
        s->status = status;
        if (status)
            memcpy(s->error, error, sizeof error);
        s->ready = true;
        pthread_cond_broadcast(&a->made);
    }
    pthread_mutex_unlock(&a->lock);
    if (a->how.leave)
        a->how.leave(a->how.user, t->number);
    vel_keep_errors(NULL);
    return NULL;
}

/* Signals go to the thread that called into the library. */
static vel_status start_threads(vel_ahead *a)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    int failed = 0;
    for (int i = 0; i < a->how.threads && !failed; i++) {
        a->thread[i] = (ahead_thread){.a = a, .number = i};
        failed = pthread_create(&a->thread[i].id, NULL, work, &a->thread[i]);
        a->n_started += !failed;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return a->n_started || !a->how.threads
               ? VEL_OK
               : vel_fail(a->ctx, VEL_UNSUPPORTED, "the system starts no thread: %s",
                          strerror(failed));
}

vel_status vel_ahead_start(vel_ctx *ctx, const vel_ahead_how *how, vel_ahead **out)
{
    *out = NULL;
    vel_ahead *a = vel_alloc(ctx, sizeof *a);
    if (!a)
        return VEL_NO_MEMORY;
    a->ctx = ctx;
    a->how = *how;
    a->claimed = a->taken = how->first;
    pthread_mutex_init(&a->lock, NULL);
    pthread_cond_init(&a->made, NULL);
    pthread_cond_init(&a->freed, NULL);
    a->slot = vel_alloc(ctx, (size_t)how->slots * sizeof *a->slot);
    a->thread = vel_alloc(ctx, (size_t)VEL_MAX(how->threads, 1) * sizeof *a->thread);
    vel_status st = a->slot && a->thread ? start_threads(a) : VEL_NO_MEMORY;
    if (st)
        vel_ahead_stop(a);
    else
        *out = a;
    return st;
}

int vel_ahead_slot(const vel_ahead *a, int64_t i)
{
    return (int)((i - a->how.first) % a->how.slots);
}

vel_status vel_ahead_take(vel_ahead *a, int64_t i, int *slot)
{
    if (i != a->taken || i >= a->how.end)
        return vel_fail(a->ctx, VEL_BUG,
                        "item %" PRId64 " was asked for where %" PRId64 " of %" PRId64 " is next",
                        i, a->taken, a->how.end);
    *slot = vel_ahead_slot(a, i);
    if (!a->how.threads) {
        a->taken++;
        return a->how.make(a->how.user, 0, i, *slot);
    }
    pthread_mutex_lock(&a->lock);
    if (i > a->how.first)
        slot_of(a, i - 1)->ready = false;
    ahead_slot *s = slot_of(a, i);
    while (!s->ready)
        pthread_cond_wait(&a->made, &a->lock);
    a->taken++;
    pthread_cond_broadcast(&a->freed);
    pthread_mutex_unlock(&a->lock);
    return s->status ? vel_fail(a->ctx, s->status, "%s", s->error) : VEL_OK;
}

bool vel_ahead_has(vel_ahead *a, int64_t i)
{
    if (i != a->taken || i >= a->how.end || !a->how.threads)
        return false;
    pthread_mutex_lock(&a->lock);
    ahead_slot *s = slot_of(a, i);
    bool has = s->ready && !s->status;
    pthread_mutex_unlock(&a->lock);
    return has;
}

void vel_ahead_stop(vel_ahead *a)
{
    if (!a)
        return;
    pthread_mutex_lock(&a->lock);
    a->stopping = true;
    pthread_cond_broadcast(&a->freed);
    pthread_mutex_unlock(&a->lock);
    for (int i = 0; i < a->n_started; i++)
        pthread_join(a->thread[i].id, NULL);
    pthread_cond_destroy(&a->freed);
    pthread_cond_destroy(&a->made);
    pthread_mutex_destroy(&a->lock);
    vel_free(a->ctx, a->slot);
    vel_free(a->ctx, a->thread);
    vel_free(a->ctx, a);
}
