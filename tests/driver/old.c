/* old.c: stands in for libcuda.so.1 of a driver from years ago, for the test that what is
 * too old is said (test_cuda.c). Of a driver's functions it has those that are asked before that is
 * known. */
int cuInit(unsigned flags);
int cuDriverGetVersion(int *version);

int cuInit(unsigned flags)
{
    (void)flags;
    return 0;
}

int cuDriverGetVersion(int *version)
{
    *version = 11040;
    return 0;
}
