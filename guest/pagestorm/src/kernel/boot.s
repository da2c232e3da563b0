// Entry, descriptor tables, page tables and traps: everything that runs in ring 0.
//
// Software KVMs emulate ring 0 slowly and without some instructions, so tables are laid out by the
// assembler where possible, and the rest is filled in by ring 3 (which may write all of memory).
// All Rust code runs in ring 3 with interrupts disabled.
//
// Constants given by boot.rs: MAX_CPUS.

.set CODE32, 0x08
.set CODE64, 0x10
.set DATA, 0x18
.set USER_DATA, 0x28 | 3
.set USER_CODE, 0x30 | 3
.set TSS_SELECTOR, 0x40
// IOPL 3, interrupts disabled, and the bit that is always set.
.set USER_RFLAGS, 0x3002
.set RING0_STACK_SIZE, 1024
.set USER_STACK_SIZE, 16384
.set TSS_SIZE, 512
// The fixed part, 0x800 ports of I/O permission bits and the closing byte of ones.
.set TSS_LIMIT, 0x68 + 0x800 / 8

// ELF note Xen/18 (XEN_ELFNOTE_PHYS32_ENTRY): 32-bit protected mode, paging off, %ebx = hvm_start_info.
.section .note.pvh, "a", @note
    .balign 4
    .long 4, 8, 18
    .asciz "Xen"
    .quad pvh_start

.section .boot.text, "ax", @progbits
.code32
.global pvh_start
pvh_start:
    cli
    cld
    mov %ebx, start_info_address
    // kvmclock tells the TSC frequency. CPUID is asked here because ring 3 may see the host's.
    mov $0x40000000, %eax
    cpuid
    cmp $0x4b4d564b, %ebx           // "KVMK"
    jne 1f
    mov $0x40000001, %eax
    cpuid
    test $8, %eax                   // KVM_FEATURE_CLOCKSOURCE2
    jz 1f
    mov $0x4b564d01, %ecx           // MSR_KVM_SYSTEM_TIME_NEW
    mov $pvclock + 1, %eax
    xor %edx, %edx
    wrmsr
1:
    lgdt gdt_pointer
enter_long_mode:
    mov $0x620, %eax                // PAE, OSFXSR, OSXMMEXCPT
    mov %eax, %cr4
    mov $pml4, %eax
    mov %eax, %cr3
    mov $0xc0000080, %ecx           // EFER
    mov $0x100, %eax                // LME
    xor %edx, %edx
    wrmsr
    mov $0x80000033, %eax           // PG, NE, ET, MP, PE
    mov %eax, %cr0
    ljmp $CODE64, $long_mode

ap_protected_mode:
    mov $DATA, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    jmp enter_long_mode

.code64
long_mode:
    mov $DATA, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    lidt idt_pointer
    mov next_cpu, %edi
    cmp ${MAX_CPUS}, %edi
    jae park
    // The TSS descriptor is written here because its base is split over three fields.
    mov %edi, %eax
    shl $9, %eax
    add $tss, %eax
    mov %edi, %ecx
    shl $4, %ecx
    add $gdt_tss, %ecx
    movw $TSS_LIMIT, (%rcx)
    movw %ax, 2(%rcx)
    shr $16, %eax
    movb %al, 4(%rcx)
    movb $0x89, 5(%rcx)
    movb $0, 6(%rcx)
    movb %ah, 7(%rcx)
    mov %edi, %eax
    shl $4, %eax
    add $TSS_SELECTOR, %eax
    ltr %ax
    mov %edi, %edx
    shl $10, %edx
    add $ring0_stacks + RING0_STACK_SIZE, %edx
    mov -8(%rdx), %rcx
    lea -16(%rdx), %rsp
    push $USER_DATA
    push %rcx
    push $USER_RFLAGS
    push $USER_CODE
    push $user_entry
    iretq

park:
    cli
    hlt
    jmp park

// From here on ring 3; %edi is the vCPU's index.
user_entry:
    xor %ebp, %ebp
    test %edi, %edi
    jnz 1f
    mov $bss_start, %edi
    mov $bss_end, %ecx
    sub %edi, %ecx
    xor %eax, %eax
    rep stosb
    mov start_info_address, %edi
    call boot_cpu_main
1:
    call application_cpu_main

// Waits in ring 0 until an interrupt has come. `syscall` and `int n` do not reach ring 0 on every
// KVM, an invalid opcode does.
.global wait_for_interrupt
wait_for_interrupt:
    ud2
    ret

.global invalid_opcode
invalid_opcode:
    cmpq $wait_for_interrupt, (%rsp)
    jne 1f
    addq $2, (%rsp)
    sti
    hlt
    cli
    iretq
1:
    push $0
    push $6
    jmp exception

.global timer_interrupt
timer_interrupt:
    push %rax
    mov $0xfee000b0, %eax           // end of interrupt
    movl $0, (%rax)
    pop %rax
.global spurious_interrupt
spurious_interrupt:
    iretq

// Exceptions 0 to 31, 16 bytes each, leave vector and error code on the stack.
.balign 16
.global exception_stubs
exception_stubs:
.set vector, 0
.rept 32
    .balign 16
    .if (vector != 8) && (vector != 10) && (vector != 11) && (vector != 12) && (vector != 13) && (vector != 14) && (vector != 17) && (vector != 21) && (vector != 29) && (vector != 30)
    push $0
    .endif
    push $vector
    jmp exception
    .set vector, vector + 1
.endr

// Goes on in ring 3 in exception_main(vector, error code, rip, cr2), on a fresh stack, for good.
.balign 16
exception:
    pop %rdi
    pop %rsi
    mov (%rsp), %rdx
    mov %cr2, %rcx
    mov %rsp, %rax
    or $RING0_STACK_SIZE - 1, %rax
    mov -7(%rax), %rax
    sub $8, %rax                    // as after a call
    movq $exception_main, (%rsp)
    movq $USER_CODE, 8(%rsp)
    movq $USER_RFLAGS, 16(%rsp)
    mov %rax, 24(%rsp)
    movq $USER_DATA, 32(%rsp)
    iretq

// Copied to a page below 1 MiB for the other vCPUs, which start there in real mode.
.code16
.global trampoline_start
trampoline_start:
    cli
    cld
    mov %cs, %ax
    mov %ax, %ds
    lgdtl trampoline_gdt_pointer - trampoline_start
    mov $1, %eax
    mov %eax, %cr0
    ljmpl $CODE32, $ap_protected_mode
.balign 8
trampoline_gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
.global trampoline_end
trampoline_end:
.code64

.section .boot.data, "aw", @progbits
// Identity map of the first 4 GiB in 2 MiB pages, for ring 3, accessed and dirty already set.
.balign 4096
.global page_directory_pointers
page_directory_pointers:
    .quad page_directories + 0x0007, page_directories + 0x1007
    .quad page_directories + 0x2007, page_directories + 0x3007
    .zero 4096 - 4 * 8
pml4:
    .quad page_directory_pointers + 7
    .zero 4096 - 8
page_directories:
.set frame, 0
.rept 2048
    .quad frame + 0xe7
    .set frame, frame + 0x200000
.endr

// Each ends with the top of the vCPU's ring 3 stack, which `exception` looks up.
.balign RING0_STACK_SIZE
ring0_stacks:
.set cpu, 0
.rept {MAX_CPUS}
    .zero RING0_STACK_SIZE - 8
    .set cpu, cpu + 1
    .quad user_stacks + cpu * USER_STACK_SIZE
.endr

.balign TSS_SIZE
tss:
.set cpu, 0
.rept {MAX_CPUS}
    .set cpu, cpu + 1
    .long 0
    .quad ring0_stacks + cpu * RING0_STACK_SIZE - 16
    .zero 0x66 - 12
    .word 0x68
    .zero 0x800 / 8
    .byte 0xff
    .balign TSS_SIZE
.endr

.balign 16
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff        // CODE32
    .quad 0x00af9b000000ffff        // CODE64
    .quad 0x00cf93000000ffff        // DATA
    .quad 0
    .quad 0x00cff3000000ffff        // USER_DATA
    .quad 0x00affb000000ffff        // USER_CODE
    .quad 0
gdt_tss:
    .zero {MAX_CPUS} * 16
gdt_end:

gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
idt_pointer:
    .word 4095
    .quad idt

.balign 8
start_info_address:
    .long 0
// Index that the next vCPU to start takes.
.global next_cpu
next_cpu:
    .long 0
// Outside .bss: KVM may have written it before .bss is cleared. 64-byte aligned, so inside a page.
.balign 64
.global pvclock
pvclock:
    .zero 64

.section .bss, "aw", @nobits
.balign 4096
.global idt
idt:
    .zero 4096
.balign 16
user_stacks:
    .zero {MAX_CPUS} * USER_STACK_SIZE
