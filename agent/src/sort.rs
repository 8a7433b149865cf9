//! Sorting in few bytes of code: the standard library's sorts are 4 to 6 KB for each type that is sorted, this one is
//! 200 bytes. Everything that is sorted here is short.

/// Heap sort: in place, not stable, never worse than n log n.
pub fn sort<T: Ord>(items: &mut [T]) {
    for start in (0..items.len() / 2).rev() {
        sift_down(items, start);
    }
    for end in (1..items.len()).rev() {
        items.swap(0, end);
        sift_down(&mut items[..end], 0);
    }
}

fn sift_down<T: Ord>(heap: &mut [T], mut node: usize) {
    loop {
        let mut child = 2 * node + 1;
        if child >= heap.len() {
            return;
        }
        if child + 1 < heap.len() && heap[child] < heap[child + 1] {
            child += 1;
        }
        if heap[node] >= heap[child] {
            return;
        }
        heap.swap(node, child);
        node = child;
    }
}

#[cfg(test)]
mod tests {
    use super::sort;

    #[test]
    fn it_sorts() {
        let mut state = 1u32;
        for length in 0..70 {
            let mut items: Vec<u32> = (0..length)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    state >> 27
                })
                .collect();
            let mut expected = items.clone();
            expected.sort_unstable();
            sort(&mut items);
            assert_eq!(items, expected);
        }
    }
}
