//! memcpy and friends, to which the compiler turns copies. Assembly, because the same loops in Rust would be
//! recognised and become calls of themselves; sixteen bytes at a time, because software emulation runs `rep movsb`
//! byte by byte.

use core::arch::global_asm;

global_asm!(
    r"
.globl agent_memcpy
.globl agent_memmove
agent_memmove:
    mov %rdi, %rax
    sub %rsi, %rax
    cmp %rdx, %rax
    jb 5f
agent_memcpy:
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

.globl agent_memset
agent_memset:
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

.globl agent_bcmp
.globl agent_memcmp
agent_bcmp:
agent_memcmp:
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

.globl agent_strlen
agent_strlen:
    xor %eax, %eax
    jmp 2f
1:  inc %rax
2:  cmpb $0, (%rdi,%rax)
    jne 1b
    ret
",
    options(att_syntax)
);

// The names that the compiler uses; in a test they are the C library's.
#[cfg(not(test))]
global_asm!(
    r"
.globl memcpy
.globl memmove
.globl memset
.globl memcmp
.globl bcmp
.globl strlen
.set memcpy, agent_memcpy
.set memmove, agent_memmove
.set memset, agent_memset
.set memcmp, agent_memcmp
.set bcmp, agent_bcmp
.set strlen, agent_strlen
"
);

#[cfg(test)]
mod tests {
    extern "C" {
        fn agent_memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8;
        fn agent_memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8;
        fn agent_memset(to: *mut u8, byte: i32, len: usize) -> *mut u8;
        fn agent_memcmp(a: *const u8, b: *const u8, len: usize) -> i32;
        fn agent_bcmp(a: *const u8, b: *const u8, len: usize) -> i32;
        fn agent_strlen(text: *const u8) -> usize;
    }

    const SIZES: [usize; 26] =
        [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 79, 80, 81, 127, 128, 129, 200, 257];

    fn pattern(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i * 7 + i / 251) as u8).collect()
    }

    #[test]
    fn copies_are_exact_at_every_size_and_place() {
        for len in SIZES {
            for (from, to) in [(0, 0), (1, 0), (0, 3), (5, 9)] {
                let source = pattern(len + 16);
                let mut target = vec![0xee; len + 32];
                // SAFETY: both buffers are longer than offset and length together.
                let end = unsafe { agent_memcpy(target.as_mut_ptr().add(to), source.as_ptr().add(from), len) };
                assert_eq!(end as usize, target.as_ptr() as usize + to);
                assert_eq!(&target[to..to + len], &source[from..from + len], "{len} {from} {to}");
                assert!(target[..to].iter().chain(&target[to + len..]).all(|b| *b == 0xee), "{len} {from} {to}");
            }
        }
    }

    #[test]
    fn overlapping_moves_keep_what_they_move() {
        for len in SIZES {
            for distance in [0usize, 1, 3, 8, 15, 16, 17, 40, 64, 100] {
                for (from, to) in [(0, distance), (distance, 0)] {
                    let mut buffer = pattern(len + distance + 8);
                    let mut expected = buffer.clone();
                    expected.copy_within(from..from + len, to);
                    // SAFETY: the buffer is longer than distance and length together.
                    unsafe { agent_memmove(buffer.as_mut_ptr().add(to), buffer.as_ptr().add(from), len) };
                    assert!(buffer == expected, "{len} bytes from {from} to {to}");
                }
            }
        }
    }

    #[test]
    fn filling_and_comparing() {
        for len in SIZES {
            let mut buffer = vec![1u8; len + 2];
            // SAFETY: the buffer is two bytes longer.
            unsafe { agent_memset(buffer.as_mut_ptr().add(1), 0x1a5, len) };
            assert!(buffer[1..=len].iter().all(|b| *b == 0xa5) && buffer[0] == 1 && buffer[len + 1] == 1, "{len}");
            let a = pattern(len);
            for at in 0..len {
                let mut b = a.clone();
                b[at] = b[at].wrapping_add(1);
                let wanted = a.cmp(&b) as i32;
                // SAFETY: both buffers are `len` long.
                let (order, differs) =
                    unsafe { (agent_memcmp(a.as_ptr(), b.as_ptr(), len), agent_bcmp(a.as_ptr(), b.as_ptr(), len)) };
                assert!(order.signum() == wanted && differs != 0, "{len} {at}");
            }
            // SAFETY: as above.
            assert_eq!(unsafe { agent_memcmp(a.as_ptr(), a.as_ptr(), len) }, 0);
            let text = vec![b'x'; len].into_iter().chain([0, b'y']).collect::<Vec<_>>();
            // SAFETY: NUL-terminated.
            assert_eq!(unsafe { agent_strlen(text.as_ptr()) }, len);
        }
    }
}
