# Holds known values in the vector, x87 and control registers until a given time, then stores what
# is in them: hold_*(rdi = struct Hold, rsi = TSC to wait for). Layout of Hold: see fpu.rs.
.set HOLD_VECTORS,     0
.set HOLD_VECTORS_OUT, 2048
.set HOLD_MASKS,       4096
.set HOLD_MASKS_OUT,   4160
.set HOLD_X87,         4224
.set HOLD_X87_OUT,     4352
.set HOLD_MXCSR,       4480
.set HOLD_MXCSR_OUT,   4484
.set HOLD_CONTROL,     4488
.set HOLD_CONTROL_OUT, 4490

.section .text.fpu, "ax"
.code64

.macro x87_load
    fninit
    fldcw [rdi + HOLD_CONTROL]
    .irp i, 7, 6, 5, 4, 3, 2, 1, 0
    fld tbyte ptr [rdi + HOLD_X87 + 16 * \i]
    .endr
    ldmxcsr [rdi + HOLD_MXCSR]
.endm

.macro x87_store
    .irp i, 0, 1, 2, 3, 4, 5, 6, 7
    fstp tbyte ptr [rdi + HOLD_X87_OUT + 16 * \i]
    .endr
    fnstcw [rdi + HOLD_CONTROL_OUT]
    fninit
    stmxcsr [rdi + HOLD_MXCSR_OUT]
    mov dword ptr [rsp - 8], 0x1f80
    ldmxcsr [rsp - 8]
.endm

.macro spin
77: pause
    rdtsc
    shl rdx, 32
    or rax, rdx
    cmp rax, rsi
    jb 77b
.endm

.macro for_16 instruction, width, base, store
    .irp i, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    .if \store
    \instruction [rdi + \base + 64 * \i], \width\i
    .else
    \instruction \width\i, [rdi + \base + 64 * \i]
    .endif
    .endr
.endm

.macro for_high_16 base, store
    .irp i, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31
    .if \store
    vmovaps [rdi + \base + 64 * \i], zmm\i
    .else
    vmovaps zmm\i, [rdi + \base + 64 * \i]
    .endif
    .endr
.endm

.globl hold_sse, hold_avx, hold_avx512
.balign 64
hold_sse:
    x87_load
    for_16 movaps, xmm, HOLD_VECTORS, 0
    spin
    for_16 movaps, xmm, HOLD_VECTORS_OUT, 1
    x87_store
    ret

.balign 64
hold_avx:
    x87_load
    for_16 vmovaps, ymm, HOLD_VECTORS, 0
    spin
    for_16 vmovaps, ymm, HOLD_VECTORS_OUT, 1
    vzeroupper
    x87_store
    ret

.balign 64
hold_avx512:
    x87_load
    for_16 vmovaps, zmm, HOLD_VECTORS, 0
    for_high_16 HOLD_VECTORS, 0
    .irp i, 0, 1, 2, 3, 4, 5, 6, 7
    kmovq k\i, [rdi + HOLD_MASKS + 8 * \i]
    .endr
    spin
    .irp i, 0, 1, 2, 3, 4, 5, 6, 7
    kmovq [rdi + HOLD_MASKS_OUT + 8 * \i], k\i
    .endr
    for_16 vmovaps, zmm, HOLD_VECTORS_OUT, 1
    for_high_16 HOLD_VECTORS_OUT, 1
    vzeroupper
    x87_store
    ret
