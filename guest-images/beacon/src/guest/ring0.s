# Everything of beacon that runs in ring 0.
#
# On a KVM without hardware virtualization ring-0 code is emulated one instruction at a
# time, slowly, and only plain instructions are known to the emulator. So this is as short as it
# can be, and whatever can be done from ring 3 is done there: page tables, IDT, TSS and the bss are
# filled in by Rust. The rings are for speed here, not for protection: all memory is open to ring 3.
#
# Each vCPU has an area of 128 KiB, aligned to its size (struct Area in ring0.rs): what ring 0 needs,
# the TSS, the ring-0 stack, and above them the ring-3 stack. Hence `rsp & -AREA_SIZE` finds it from both.

.set AREA_SIZE,      0x20000
.set AREA_TICKS,     8
.set AREA_PERIOD,    16
.set AREA_DEADLINE,  24
.set AREA_X2APIC,    32

.set CODE32, 0x08
.set CODE0,  0x10
.set DATA3,  0x1b
.set CODE3,  0x23
.set FIRST_TSS, 0x30

.set AREA_TSS,  40
.set TSS_LIMIT, 104 + 8192           # with an I/O bitmap for all ports

.set MSR_EFER,  0xc0000080
.set MSR_X2APIC_EOI,   0x80b
.set MSR_TSC_DEADLINE, 0x6e0

.set CR0_LONG,  0x80010033           # PG WP NE ET MP PE
.set CR0_PROT,  0x00000033
.set CR4_BASE,  0x00000620           # OSXMMEXCPT OSFXSR PAE

# ---- PVH note (xen/include/public/elfnote.h) ------------------------------------------------
.section .note.pvh, "a", @note
.balign 4
.long 4, 8, 18                       # name size, value size, XEN_ELFNOTE_PHYS32_ENTRY
.asciz "Xen"
.quad pvh_entry32

# ---- entry ----------------------------------------------------------------------------------
.section .text.entry, "ax"

# PVH: 32-bit protected mode without paging, ebx = hvm_start_info.
.code32
.globl pvh_entry32
pvh_entry32:
    rdtsc
    mov edi, eax
    mov ebp, edx
    xor esi, esi                     # protocol: PVH
    lgdt [gdt_pointer]
    mov eax, CR4_BASE
    mov cr4, eax
    mov eax, offset page_map
    mov cr3, eax
    mov ecx, MSR_EFER
    rdmsr
    or eax, 0x100                    # LME
    wrmsr
    mov eax, CR0_LONG
    mov cr0, eax
    .byte 0xea                       # jmp far CODE0:bsp_64
    .long bsp_64
    .word CODE0

# Linux: long mode with an identity map, rsi = boot_params.
.code64
.globl linux_entry64
linux_entry64:
    cli
    rdtsc
    mov edi, eax
    mov ebp, edx
    mov rbx, rsi
    mov esi, 1                       # protocol: Linux
    lgdt [gdt_pointer]
    mov eax, CR4_BASE
    mov cr4, rax
    mov eax, offset page_map
    mov cr3, rax
    mov eax, CR0_LONG
    mov cr0, rax

# rbx = boot information, esi = protocol, ebp:edi = TSC at entry
bsp_64:
    mov eax, edi
    shl rbp, 32
    or rbp, rax
    # The TSS descriptor, whose fields lie scattered; the other vCPUs' are filled in by Rust.
    mov eax, offset __bsp_area + AREA_TSS
    mov edx, eax
    shl eax, 16
    or eax, TSS_LIMIT
    mov [gdt_tss], eax
    mov eax, edx
    shr eax, 16
    and eax, 0xff
    and edx, 0xff000000
    or eax, edx
    or eax, 0x8900                   # present, 64-bit TSS
    mov [gdt_tss + 4], eax
    mov esp, offset __bsp_area + AREA_SIZE
    mov r12, offset bsp_ring3
    mov r13d, FIRST_TSS
    # falls through

# Ends a vCPU's set-up and goes to ring 3: rsp = ring-3 stack, r12 = where to, r13 = TSS selector.
enter_ring3:
    lidt [idt_pointer]
    ltr r13w
    mov eax, DATA3
    mov ds, eax
    mov es, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    mov rax, rsp
    sub rsp, 256                     # below what ring 3 starts with
    push DATA3
    push rax
    push 2                           # rflags: interrupts off
    push CODE3
    push r12
    iretq

# ---- ring 3, first steps --------------------------------------------------------------------
bsp_ring3:
    mov r8d, esi
    mov edi, offset __bss_start
    mov ecx, offset __bss_end
    sub ecx, edi
    xor eax, eax
    rep stosb
    mov edi, r8d                     # (protocol, boot information, TSC at entry)
    mov rsi, rbx
    mov rdx, rbp
    call beacon_main
    ud2

ap_ring3:
    mov rdi, [ap_argument]
    call beacon_ap
    ud2

# ---- application processors -----------------------------------------------------------------
# Copied to 0x8000 (AP_TRAMPOLINE in smp.rs); real mode, CS:IP = 0x800:0.
.code16
.globl ap_trampoline, ap_trampoline_end
ap_trampoline:
    cli
    mov ax, cs
    mov ds, ax
    lgdtd [AP_GDT_POINTER]
    mov eax, CR0_PROT
    mov cr0, eax
    .byte 0x66, 0xea                 # jmp far CODE32:ap_32
    .long ap_32
    .word CODE32
ap_gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
ap_trampoline_end:
.set AP_GDT_POINTER, ap_gdt_pointer - ap_trampoline

.code32
ap_32:
    mov eax, CR4_BASE
    mov cr4, eax
    mov eax, offset page_map
    mov cr3, eax
    mov ecx, MSR_EFER
    mov eax, 0x100                   # LME; INIT left the rest 0
    xor edx, edx
    wrmsr
    mov eax, CR0_LONG
    mov cr0, eax
    .byte 0xea
    .long ap_64
    .word CODE0

.code64
ap_64:
    mov rsp, [ap_stack]
    mov r13, [ap_selector]
    mov r12, offset ap_ring3
    jmp enter_ring3

# ---- the gate into ring 0 -------------------------------------------------------------------
# Called from ring 3: eax = which, edi, esi, edx = arguments; result in edx:eax; ecx is lost.
#
# An invalid instruction at a known place, not `syscall`: the exception does the same on every
# KVM, while on one that runs ring 3 natively and emulates ring 0 a `syscall` was seen to
# arrive at LSTAR still in ring 3.
.globl ring0_gate
ring0_gate:
    ud2
    ret

.globl invalid_opcode
invalid_opcode:
    cmp qword ptr [rsp], offset ring0_gate
    je 1f
    push 0
    push 6
    jmp exception_common
1:  add qword ptr [rsp], 2
    cmp eax, 1
    jb 10f
    je 11f
    cmp eax, 3
    jb 12f
    je 13f
    cmp eax, 5
    jb 14f
    ja 16f
15: hlt                              # 5: stop this vCPU for good; interrupts are off
    jmp 15b
16: sti                              # 6: wait for an interrupt
    hlt
    iretq
10: mov ecx, edi                     # 0: read MSR edi
    rdmsr
    iretq
11: mov ecx, edi                     # 1: write edx:esi to MSR edi
    mov eax, esi
    wrmsr
    iretq
12: mov rax, cr4                     # 2: allow XSAVE and write edx:esi to XCR0
    or eax, 0x40000
    mov cr4, rax
    mov eax, esi
    xor ecx, ecx
    xsetbv
    iretq
13: or dword ptr [rsp + 16], 0x200   # 3: return with interrupts on
    iretq
14: lidt [null_pointer]              # 4: triple fault
    ud2

# ---- interrupts -----------------------------------------------------------------------------
.globl timer_interrupt, spurious_interrupt
timer_interrupt:
    push rax
    push rbx
    push rcx
    push rdx
    mov rbx, rsp
    and rbx, -AREA_SIZE
    inc qword ptr [rbx + AREA_TICKS]
    mov rcx, [rbx + AREA_DEADLINE]   # 0: the timer is periodic by itself
    test rcx, rcx
    jz 1f
    rdtsc
    shl rdx, 32
    or rax, rdx
    add rcx, [rbx + AREA_PERIOD]     # on schedule, so that a late interrupt makes no later ones
    cmp rcx, rax
    ja 4f
    mov rcx, rax                     # more than a period late: from now
    add rcx, [rbx + AREA_PERIOD]
4:  mov [rbx + AREA_DEADLINE], rcx
    mov rax, rcx
    mov rdx, rcx
    shr rdx, 32
    mov ecx, MSR_TSC_DEADLINE
    wrmsr
1:
end_of_interrupt:
    cmp dword ptr [rbx + AREA_X2APIC], 0
    je 2f
    mov ecx, MSR_X2APIC_EOI
    xor eax, eax
    xor edx, edx
    wrmsr
    jmp 3f
2:  mov ecx, 0xfee000b0              # EOI
    mov dword ptr [rcx], 0
3:  pop rdx
    pop rcx
    pop rbx
    pop rax
spurious_interrupt:
    iretq

# Devices: count, and tell the LAPIC; the rest is done in ring 3. One stub of 16 bytes for each.
.balign 16
.globl device_stubs
device_stubs:
.set line, 0
.rept 16
    .balign 16
    inc qword ptr [device_counts + line * 8]
    jmp device_common
    .set line, line + 1
.endr

.balign 16
device_common:
    push rax
    push rbx
    push rcx
    push rdx
    mov rbx, rsp
    and rbx, -AREA_SIZE
    jmp end_of_interrupt

# ---- exceptions -----------------------------------------------------------------------------
# 32 stubs of 16 bytes; those whose exception has no error code push a zero.
.balign 16
.globl exception_stubs
exception_stubs:
.set vector, 0
.rept 32
    .balign 16
    .if vector != 8 && vector != 10 && vector != 11 && vector != 12 && vector != 13 && vector != 14 && vector != 17 && vector != 21 && vector != 29 && vector != 30
    push 0
    .endif
    push vector
    jmp exception_common
    .set vector, vector + 1
.endr

# Continues in ring 3, on what is free of the stack: exception_report(frame, cr2).
.balign 16
exception_common:
    mov rdi, rsp
    mov rsi, cr2
    lea rax, [rsp - 256]
    and rax, -16
    sub rax, 8                       # as after a call
    push DATA3
    push rax
    push 2
    push CODE3
    push offset exception_report
    iretq

# ---- tables ---------------------------------------------------------------------------------
.section .tables, "aw"
# The identity map of the first 4 GiB in 2 MiB pages, open to ring 3. Built by the assembler: a
# loop in ring 0 would take milliseconds. Rust adds what is above.
.balign 4096
.globl page_map, page_directory_pointers
page_map:
    .quad page_directory_pointers + 7
    .fill 511, 8, 0
page_directory_pointers:
    .quad page_directories + 7, page_directories + 0x1007
    .quad page_directories + 0x2007, page_directories + 0x3007
    .fill 508, 8, 0
page_directories:
.set address, 0
.rept 2048
    # P RW US A D PS, uncached from 3.5 GiB on, where the interrupt controllers are
    .if address < 0xe0000000
    .quad address + 0xe7
    .else
    .quad address + 0xff
    .endif
    .set address, address + 0x200000
.endr

.balign 16
.globl gdt, gdt_tss
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff         # CODE32
    .quad 0x00af9b000000ffff         # CODE0
    .quad 0x00cff3000000ffff         # DATA3
    .quad 0x00affb000000ffff         # CODE3
    .quad 0
gdt_tss:
    .fill 64 * 2, 8, 0               # one TSS descriptor per vCPU
gdt_end:

.balign 8
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
.balign 8
idt_pointer:
    .word 256 * 16 - 1
    .quad {idt}
.balign 8
null_pointer:
    .word 0
    .quad 0
.balign 8
.globl device_counts
device_counts: .fill 16, 8, 0
.globl ap_stack, ap_selector, ap_argument
ap_stack:    .quad 0
ap_selector: .quad 0
ap_argument: .quad 0
