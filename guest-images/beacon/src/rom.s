# A boot ROM for QEMU that starts a PVH kernel given with -kernel, in a few milliseconds: firmware is
# ring-0 code, which a KVM without hardware virtualization emulates instruction by instruction.
#
# QEMU has the kernel in memory already when the machine starts, and tells the rest by fw_cfg
# (docs/specs/fw_cfg.rst): its entry, the command line, the memory map and the number of vCPUs.
# What firmware would add is ACPI tables: they are in the image (qemu_bios.rs) and copied to RAM.

.set FW_CFG,           0x510         # selector; data at the port after it
.set KEY_CPUS,         0x05
.set KEY_ENTRY,        0x10
.set KEY_COMMAND_SIZE, 0x14
.set KEY_COMMAND,      0x15
.set KEY_DIRECTORY,    0x19
.set FILE_SIZE,        64            # of a directory entry; selector at 4, name at 8

# RAM that is used, all below beacon.
.set SCRATCH,     0x5000
.set STACK,       0x6000
.set START_INFO,  0x6000
.set MAP,         0x6100             # 24 bytes each
.set MAP_MAX,     32
.set ACPI,        0xa000             # as qemu_bios.rs has it
.set ACPI_SIZE,   0x1000
.set COMMAND,     0x20000
.set COMMAND_MAX, 4096
.set ROM_ACPI,    0xffff8000

# Offsets in the tables, as qemu_bios.rs has them.
.set RSDP_PC,       0x000
.set RSDP_MICROVM,  0x040
.set MADT,          0x100
.set MADT_CHECKSUM, MADT + 9
.set MADT_FLAGS,    MADT + 44 + 4    # of the first processor; the next is 8 further
.set MADT_MAX,      64

.section .text.rom, "ax"
.code32
rom_start:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov esp, STACK
    cld

    # The ACPI tables, with as many processors enabled as there are.
    mov esi, ROM_ACPI
    mov edi, ACPI
    mov ecx, ACPI_SIZE / 4
    rep movsd
    mov eax, KEY_CPUS
    call read_dword                  # a 16-bit item: the rest reads as zero
    movzx ecx, ax
    cmp ecx, MADT_MAX
    jbe 1f
    mov ecx, MADT_MAX
1:  mov edi, ACPI + MADT_FLAGS
2:  mov byte ptr [edi], 1
    dec byte ptr [ACPI + MADT_CHECKSUM]
    add edi, 8
    dec ecx
    jnz 2b

    # start_info, zero but for what is known.
    mov edi, START_INFO
    mov ecx, 14
    xor eax, eax
    rep stosd
    mov dword ptr [START_INFO], 0x336ec578
    mov dword ptr [START_INFO + 4], 1
    mov dword ptr [START_INFO + 24], COMMAND
    mov dword ptr [START_INFO + 32], ACPI + RSDP_MICROVM
    mov dword ptr [START_INFO + 40], MAP

    # On the i440FX: switch the PM ports on, where the tables say they are.
    mov eax, 0x80000000
    call pci_select
    in eax, dx
    cmp eax, 0x12378086
    jne 3f
    mov dword ptr [START_INFO + 32], ACPI + RSDP_PC
    mov eax, 0x80000b40              # 00:01.3 PMBA
    call pci_select
    mov eax, 0x601
    out dx, eax
    mov eax, 0x80000b80              # PMREGMISC: PMIOSE
    call pci_select
    mov al, 1
    out dx, al
3:
    # The command line, which QEMU ends with a zero.
    mov eax, KEY_COMMAND_SIZE
    call read_dword
    mov ecx, eax
    cmp ecx, COMMAND_MAX
    jbe 4f
    mov ecx, COMMAND_MAX
4:  mov edi, COMMAND
    mov eax, KEY_COMMAND
    call read
    mov byte ptr [edi], 0

    # The memory map: the file etc/e820.
    mov eax, KEY_DIRECTORY
    call read_dword
    bswap eax
    mov ebp, eax
5:  dec ebp
    js fail
    mov edi, SCRATCH
    mov ecx, FILE_SIZE
    rep insb                         # dx is still the data port
    cmp dword ptr [SCRATCH + 8], 0x2f637465      # "etc/"
    jne 5b
    cmp dword ptr [SCRATCH + 12], 0x30323865     # "e820"
    jne 5b
    cmp byte ptr [SCRATCH + 16], 0
    jne 5b
    mov ebp, [SCRATCH]
    bswap ebp                        # bytes; 20 for each entry
    movzx eax, word ptr [SCRATCH + 4]
    xchg al, ah
    xor ecx, ecx
    mov edi, MAP
    call read                        # selects the file
6:  sub ebp, 20
    jb 7f
    cmp dword ptr [START_INFO + 48], MAP_MAX
    jae 7f
    mov ecx, 20
    rep insb
    xor eax, eax
    stosd
    inc dword ptr [START_INFO + 48]
    jmp 6b
7:
    mov eax, KEY_ENTRY
    call read_dword
    test eax, eax
    jz fail
    mov ebx, START_INFO
    jmp eax

fail:
    hlt
    jmp fail

# Reads ecx bytes of item eax to edi; dx = the data port then.
read:
    mov edx, FW_CFG
    out dx, ax
    inc edx
    rep insb
    ret

# Reads four bytes of item eax into eax; dx as above.
read_dword:
    mov edi, SCRATCH
    mov ecx, 4
    call read
    mov eax, [SCRATCH]
    ret

# Selects a PCI configuration register; dx = the data port then.
pci_select:
    mov edx, 0xcf8
    out dx, eax
    add edx, 4
    ret

.balign 8
rom_gdt:
    .quad 0
    .quad 0x00cf9b000000ffff
    .quad 0x00cf93000000ffff
rom_gdt_pointer:
    .word 23
    .long rom_gdt

.code16
rom_real:
    cli
    lgdtd cs:[ROM_GDT_POINTER]
    mov eax, 0x33
    mov cr0, eax
    .byte 0x66, 0xea
    .long rom_start
    .word 8
.set ROM_GDT_POINTER, rom_gdt_pointer - rom_start
.set ROM_REAL, rom_real - rom_start

.section .text.reset, "ax"
.code16
.globl rom_reset
rom_reset:
    .byte 0xe9                       # jmp near, within the segment
    .word ROM_REAL - 3 - 0xfff0
