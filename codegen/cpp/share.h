// Work that several threads share: torch's own, as many as it uses.

template <class F>
struct Job {
    F run;
    i64 count, next;

    static void work(void *job_) {
        Job *job = (Job *)job_;
        for (;;) {
            i64 number = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
            if (number >= job->count) break;
            job->run(number);
        }
    }
};

// Calls f(0) .. f(count - 1), each once. Who does what is left to chance; no result depends on it.
template <class F>
static void share_among(void (*parallel)(void (*)(void *), void *, unsigned, unsigned), i64 threads, i64 count, F f) {
    Job<F> job{f, count, 0};
    if (threads > count) threads = count;
    if (threads > 1)
        parallel(Job<F>::work, &job, threads, 0);
    else
        Job<F>::work(&job);
}
