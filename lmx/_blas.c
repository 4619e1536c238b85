/* The BLAS and LAPACK functions that MLX's CPU library imports, forwarded to the PyPI wheel scipy-openblas32, which
 * exports OpenBLAS under names that begin with "scipy_". lmx/serving/openblas.py preloads this and that library into
 * the engine; then the dynamic linker gives MLX these functions instead of the slow ones in its own wheel.
 *
 * Each is a jump, so that no argument list need be repeated here (LAPACK's have hidden string lengths). On Linux only;
 * tests/test_openblas.py holds this list against what MLX imports. No Python module, though it is built like one.
 */

#if defined(__x86_64__)
#define JUMP(target) "jmp " target "@PLT"
#elif defined(__aarch64__)
#define JUMP(target) "b " target
#else
#error "no jump for this processor: MLX has no Linux wheel for it either"
#endif

#define FORWARD(name)                                                          \
    __asm__(".text\n.p2align 4\n.globl " #name "\n.type " #name ", %function\n" \
            #name ":\n" JUMP("scipy_" #name) "\n.size " #name ", . - " #name "\n");

FORWARD(cblas_sgemm)
FORWARD(cblas_dgemm)
FORWARD(cblas_cgemm)
FORWARD(sgetrf_)
FORWARD(dgetrf_)
FORWARD(sgetri_)
FORWARD(dgetri_)
FORWARD(strtri_)
FORWARD(dtrtri_)
FORWARD(spotrf_)
FORWARD(dpotrf_)
FORWARD(sgeqrf_)
FORWARD(dgeqrf_)
FORWARD(sorgqr_)
FORWARD(dorgqr_)
FORWARD(sgesdd_)
FORWARD(dgesdd_)
FORWARD(cgesdd_)
FORWARD(ssyevd_)
FORWARD(dsyevd_)
FORWARD(cheevd_)
FORWARD(sgeev_)
FORWARD(dgeev_)
FORWARD(cgeev_)

/* An executable stack is what the linker gives to assembly that does not say otherwise. */
__asm__(".section .note.GNU-stack,\"\",%progbits\n");
