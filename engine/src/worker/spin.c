/* How long libgomp's threads wait awake for one another. It reads GOMP_SPINCOUNT once, when the process starts, and has no
 * call to change it later. Where llama.cpp was built with another OpenMP the variable is not there, and nothing is set. */
extern unsigned long gomp_spin_count_var __attribute__((weak));

int karez_wait_awake(unsigned long rounds) {
    unsigned long *variable = &gomp_spin_count_var;
    if (variable == 0) return 0;
    __atomic_store_n(variable, rounds, __ATOMIC_RELAXED);
    return 1;
}
