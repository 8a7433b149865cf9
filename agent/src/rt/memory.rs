//! memcpy and friends, to which the compiler turns copies. Assembly, because the same loops in Rust would be
//! recognised and become calls of themselves; sixteen bytes at a time, because software emulation runs `rep movsb`
//! byte by byte.

use core::arch::global_asm;

global_asm!(
    r"
.globl memcpy
.globl memmove
memmove:
    mov %rdi, %rax
    sub %rsi, %rax
    cmp %rdx, %rax
    jb 5f
memcpy:
    mov %rdi, %rax
    cmp $16, %rdx
    jb 6f
    movups -16(%rsi,%rdx), %xmm4
    lea -16(%rdi,%rdx), %r8
    sub $64, %rdx
    jb 2f
1:  movups (%rsi), %xmm0
    movups 16(%rsi), %xmm1
    movups 32(%rsi), %xmm2
    movups 48(%rsi), %xmm3
    movups %xmm0, (%rdi)
    movups %xmm1, 16(%rdi)
    movups %xmm2, 32(%rdi)
    movups %xmm3, 48(%rdi)
    add $64, %rsi
    add $64, %rdi
    sub $64, %rdx
    jae 1b
2:  add $64, %rdx
3:  cmp $16, %rdx
    jbe 4f
    movups (%rsi), %xmm0
    movups %xmm0, (%rdi)
    add $16, %rsi
    add $16, %rdi
    sub $16, %rdx
    jmp 3b
4:  movups %xmm4, (%r8)
    ret
// Overlapping with the target above the source: from the end, the first sixteen bytes kept aside.
5:  mov %rdi, %rax
    cmp $16, %rdx
    jb 6f
    movups (%rsi), %xmm4
7:  cmp $16, %rdx
    jbe 8f
    movups -16(%rsi,%rdx), %xmm0
    movups %xmm0, -16(%rdi,%rdx)
    sub $16, %rdx
    jmp 7b
8:  movups %xmm4, (%rdi)
    ret
// Fewer than sixteen: two overlapping loads before two stores.
6:  cmp $8, %edx
    jae 9f
    cmp $4, %edx
    jae 10f
    test %edx, %edx
    jz 12f
    movzbl (%rsi), %ecx
    cmp $2, %edx
    jb 11f
    movzwl -2(%rsi,%rdx), %esi
    mov %si, -2(%rdi,%rdx)
11: mov %cl, (%rdi)
12: ret
9:  mov (%rsi), %rcx
    mov -8(%rsi,%rdx), %rsi
    mov %rsi, -8(%rdi,%rdx)
    mov %rcx, (%rdi)
    ret
10: mov (%rsi), %ecx
    mov -4(%rsi,%rdx), %esi
    mov %esi, -4(%rdi,%rdx)
    mov %ecx, (%rdi)
    ret

.globl memset
memset:
    mov %rdi, %rax
    movzbl %sil, %esi
    movabs $0x0101010101010101, %rcx
    imul %rsi, %rcx
    cmp $16, %rdx
    jb 3f
    movq %rcx, %xmm0
    punpcklqdq %xmm0, %xmm0
    movups %xmm0, -16(%rdi,%rdx)
1:  movups %xmm0, (%rdi)
    add $16, %rdi
    sub $16, %rdx
    cmp $16, %rdx
    jae 1b
    ret
3:  cmp $8, %edx
    jb 4f
    mov %rcx, (%rdi)
    mov %rcx, -8(%rdi,%rdx)
    ret
4:  test %edx, %edx
    jz 6f
5:  mov %cl, (%rdi)
    inc %rdi
    dec %edx
    jnz 5b
6:  ret

.globl bcmp
.globl memcmp
bcmp:
memcmp:
    xor %ecx, %ecx
1:  lea 8(%rcx), %r8
    cmp %rdx, %r8
    ja 3f
    mov (%rdi,%rcx), %rax
    cmp (%rsi,%rcx), %rax
    jne 3f
    mov %r8, %rcx
    jmp 1b
2:  movzbl (%rdi,%rcx), %eax
    movzbl (%rsi,%rcx), %r8d
    inc %rcx
    sub %r8d, %eax
    jne 4f
3:  cmp %rdx, %rcx
    jb 2b
    xor %eax, %eax
4:  ret

.globl strlen
strlen:
    xor %eax, %eax
    jmp 2f
1:  inc %rax
2:  cmpb $0, (%rdi,%rax)
    jne 1b
    ret
",
    options(att_syntax)
);
