//! Names of system calls and their numbers, per ABI.
//!
//! From the headers of Linux 6.1 (`asm/unistd_64.h`, `unistd_32.h`, `unistd_x32.h`, `asm-generic/unistd.h`), with the
//! calls added up to 6.17. One sorted text per architecture and the offsets of its entries: no relocations. Looking up
//! the names of a usual profile is a visible part of a container's start, so that one look answers for all ABIs.

/// A call's number in each ABI that has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Numbers {
    /// The machine's own 64-bit calls.
    pub native: Option<u32>,
    /// 32-bit calls (`int 0x80`) of an x86-64 machine.
    pub x86: Option<u32>,
    /// x32 calls of an x86-64 machine, without the x32 bit.
    pub x32: Option<u32>,
}

/// The numbers of a call; none where the name is unknown.
pub fn numbers(name: &str) -> Numbers {
    let Some(fields) = find(name.as_bytes()) else { return Numbers::default() };
    let mut columns = fields.split(|byte| *byte == b' ').map(parse);
    let native = columns.next().flatten();
    let x86 = columns.next().flatten();
    // Most x32 calls share the number of the 64-bit one; the others are in the third column.
    let x32 = columns.next().unwrap_or(native).filter(|_| cfg!(target_arch = "x86_64"));
    Numbers { native, x86, x32 }
}

/// Decimal digits; the table has `-` where an ABI does not have the call.
fn parse(digits: &[u8]) -> Option<u32> {
    digits.iter().try_fold(0, |number, digit| digit.is_ascii_digit().then(|| number * 10 + u32::from(digit - b'0')))
}

/// The text after `name` in the table.
fn find(name: &[u8]) -> Option<&'static [u8]> {
    if name.contains(&b' ') {
        return None;
    }
    let entry = |at: usize| {
        let start = usize::from(OFFSETS[at]);
        let end = OFFSETS.get(at + 1).map_or(TABLE.len(), |next| usize::from(*next) - 1);
        &TABLE.as_bytes()[start..end]
    };
    let (mut low, mut high) = (0, OFFSETS.len());
    while low < high {
        let middle = usize::midpoint(low, high);
        let candidate = entry(middle);
        // An entry's name ends with a blank, which sorts before every letter.
        let ordering = match candidate.get(..name.len()) {
            Some(start) => start.cmp(name).then_with(|| candidate[name.len()..].first().cmp(&Some(&b' '))),
            None => candidate.cmp(name),
        };
        match ordering {
            core::cmp::Ordering::Equal => return candidate.get(name.len() + 1..),
            core::cmp::Ordering::Less => low = middle + 1,
            core::cmp::Ordering::Greater => high = middle,
        }
    }
    None
}

/// Where each entry of the table starts.
static OFFSETS: [u16; ENTRIES] = {
    let mut offsets = [0; ENTRIES];
    let (mut at, mut entry) = (0, 1);
    while at < TABLE.len() {
        if TABLE.as_bytes()[at] == b',' {
            offsets[entry] = at as u16 + 1;
            entry += 1;
        }
        at += 1;
    }
    offsets
};

const ENTRIES: usize = {
    let (mut at, mut count) = (0, 1);
    while at < TABLE.len() {
        if TABLE.as_bytes()[at] == b',' {
            count += 1;
        }
        at += 1;
    }
    count
};

/// `name x86-64 i386 [x32]`, `-` where an ABI does not have the call.
#[cfg(target_arch = "x86_64")]
#[rustfmt::skip]
const TABLE: &str = "\
    _llseek - 140,_newselect - 142,_sysctl 156 149,accept 43 -,accept4 288 364,access 21 33,acct 163 51,\
    add_key 248 286,adjtimex 159 124,afs_syscall 183 137,alarm 37 27,arch_prctl 158 384,bdflush - 134,bind 49 361,\
    bpf 321 357,break - 17,brk 12 45,cachestat 451 451,capget 125 184,capset 126 185,chdir 80 12,chmod 90 15,\
    chown 92 182,chown32 - 212,chroot 161 61,clock_adjtime 305 343,clock_adjtime64 - 405,clock_getres 229 266,\
    clock_getres_time64 - 406,clock_gettime 228 265,clock_gettime64 - 403,clock_nanosleep 230 267,\
    clock_nanosleep_time64 - 407,clock_settime 227 264,clock_settime64 - 404,clone 56 120,clone3 435 435,close 3 6,\
    close_range 436 436,connect 42 362,copy_file_range 326 377,creat 85 8,create_module 174 127,\
    delete_module 176 129,dup 32 41,dup2 33 63,dup3 292 330,epoll_create 213 254,epoll_create1 291 329,\
    epoll_ctl 233 255,epoll_ctl_old 214 -,epoll_pwait 281 319,epoll_pwait2 441 441,epoll_wait 232 256,\
    epoll_wait_old 215 -,eventfd 284 323,eventfd2 290 328,execve 59 11 520,execveat 322 358 545,exit 60 1,\
    exit_group 231 252,faccessat 269 307,faccessat2 439 439,fadvise64 221 250,fadvise64_64 - 272,fallocate 285 324,\
    fanotify_init 300 338,fanotify_mark 301 339,fchdir 81 133,fchmod 91 94,fchmodat 268 306,fchmodat2 452 452,\
    fchown 93 95,fchown32 - 207,fchownat 260 298,fcntl 72 55,fcntl64 - 221,fdatasync 75 148,fgetxattr 193 231,\
    file_getattr 468 468,file_setattr 469 469,finit_module 313 350,flistxattr 196 234,flock 73 143,fork 57 2,\
    fremovexattr 199 237,fsconfig 431 431,fsetxattr 190 228,fsmount 432 432,fsopen 430 430,fspick 433 433,\
    fstat 5 108,fstat64 - 197,fstatat64 - 300,fstatfs 138 100,fstatfs64 - 269,fsync 74 118,ftime - 35,\
    ftruncate 77 93,ftruncate64 - 194,futex 202 240,futex_requeue 456 456,futex_time64 - 422,futex_wait 455 455,\
    futex_waitv 449 449,futex_wake 454 454,futimesat 261 299,get_kernel_syms 177 130,get_mempolicy 239 275,\
    get_robust_list 274 312 531,get_thread_area 211 244,getcpu 309 318,getcwd 79 183,getdents 78 141,\
    getdents64 217 220,getegid 108 50,getegid32 - 202,geteuid 107 49,geteuid32 - 201,getgid 104 47,getgid32 - 200,\
    getgroups 115 80,getgroups32 - 205,getitimer 36 105,getpeername 52 368,getpgid 121 132,getpgrp 111 65,\
    getpid 39 20,getpmsg 181 188,getppid 110 64,getpriority 140 96,getrandom 318 355,getresgid 120 171,\
    getresgid32 - 211,getresuid 118 165,getresuid32 - 209,getrlimit 97 76,getrusage 98 77,getsid 124 147,\
    getsockname 51 367,getsockopt 55 365 542,gettid 186 224,gettimeofday 96 78,getuid 102 24,getuid32 - 199,\
    getxattr 191 229,getxattrat 464 464,gtty - 32,idle - 112,init_module 175 128,inotify_add_watch 254 292,\
    inotify_init 253 291,inotify_init1 294 332,inotify_rm_watch 255 293,io_cancel 210 249,io_destroy 207 246,\
    io_getevents 208 247,io_pgetevents 333 385,io_pgetevents_time64 - 416,io_setup 206 245 543,io_submit 209 248 544,\
    io_uring_enter 426 426,io_uring_register 427 427,io_uring_setup 425 425,ioctl 16 54 514,ioperm 173 101,\
    iopl 172 110,ioprio_get 252 290,ioprio_set 251 289,ipc - 117,kcmp 312 349,kexec_file_load 320 -,\
    kexec_load 246 283 528,keyctl 250 288,kill 62 37,landlock_add_rule 445 445,landlock_create_ruleset 444 444,\
    landlock_restrict_self 446 446,lchown 94 16,lchown32 - 198,lgetxattr 192 230,link 86 9,linkat 265 303,\
    listen 50 363,listmount 458 458,listxattr 194 232,listxattrat 465 465,llistxattr 195 233,lock - 53,\
    lookup_dcookie 212 253,lremovexattr 198 236,lseek 8 19,lsetxattr 189 227,lsm_get_self_attr 459 459,\
    lsm_list_modules 461 461,lsm_set_self_attr 460 460,lstat 6 107,lstat64 - 196,madvise 28 219,\
    map_shadow_stack 453 453,mbind 237 274,membarrier 324 375,memfd_create 319 356,memfd_secret 447 447,\
    migrate_pages 256 294,mincore 27 218,mkdir 83 39,mkdirat 258 296,mknod 133 14,mknodat 259 297,mlock 149 150,\
    mlock2 325 376,mlockall 151 152,mmap 9 90,mmap2 - 192,modify_ldt 154 123,mount 165 21,mount_setattr 442 442,\
    move_mount 429 429,move_pages 279 317 533,mprotect 10 125,mpx - 56,mq_getsetattr 245 282,mq_notify 244 281 527,\
    mq_open 240 277,mq_timedreceive 243 280,mq_timedreceive_time64 - 419,mq_timedsend 242 279,\
    mq_timedsend_time64 - 418,mq_unlink 241 278,mremap 25 163,mseal 462 462,msgctl 71 402,msgget 68 399,\
    msgrcv 70 401,msgsnd 69 400,msync 26 144,munlock 150 151,munlockall 152 153,munmap 11 91,\
    name_to_handle_at 303 341,nanosleep 35 162,newfstatat 262 -,nfsservctl 180 169,nice - 34,oldfstat - 28,\
    oldlstat - 84,oldolduname - 59,oldstat - 18,olduname - 109,open 2 5,open_by_handle_at 304 342,open_tree 428 428,\
    open_tree_attr 467 467,openat 257 295,openat2 437 437,pause 34 29,perf_event_open 298 336,personality 135 136,\
    pidfd_getfd 438 438,pidfd_open 434 434,pidfd_send_signal 424 424,pipe 22 42,pipe2 293 331,pivot_root 155 217,\
    pkey_alloc 330 381,pkey_free 331 382,pkey_mprotect 329 380,poll 7 168,ppoll 271 309,ppoll_time64 - 414,\
    prctl 157 172,pread64 17 180,preadv 295 333 534,preadv2 327 378 546,prlimit64 302 340,process_madvise 440 440,\
    process_mrelease 448 448,process_vm_readv 310 347 539,process_vm_writev 311 348 540,prof - 44,profil - 98,\
    pselect6 270 308,pselect6_time64 - 413,ptrace 101 26 521,putpmsg 182 189,pwrite64 18 181,pwritev 296 334 535,\
    pwritev2 328 379 547,query_module 178 167,quotactl 179 131,quotactl_fd 443 443,read 0 3,readahead 187 225,\
    readdir - 89,readlink 89 85,readlinkat 267 305,readv 19 145 515,reboot 169 88,recvfrom 45 371 517,\
    recvmmsg 299 337 537,recvmmsg_time64 - 417,recvmsg 47 372 519,remap_file_pages 216 257,removexattr 197 235,\
    removexattrat 466 466,rename 82 38,renameat 264 302,renameat2 316 353,request_key 249 287,restart_syscall 219 0,\
    rmdir 84 40,rseq 334 386,rt_sigaction 13 174 512,rt_sigpending 127 176 522,rt_sigprocmask 14 175,\
    rt_sigqueueinfo 129 178 524,rt_sigreturn 15 173 513,rt_sigsuspend 130 179,rt_sigtimedwait 128 177 523,\
    rt_sigtimedwait_time64 - 421,rt_tgsigqueueinfo 297 335 536,sched_get_priority_max 146 159,\
    sched_get_priority_min 147 160,sched_getaffinity 204 242,sched_getattr 315 352,sched_getparam 143 155,\
    sched_getscheduler 145 157,sched_rr_get_interval 148 161,sched_rr_get_interval_time64 - 423,\
    sched_setaffinity 203 241,sched_setattr 314 351,sched_setparam 142 154,sched_setscheduler 144 156,\
    sched_yield 24 158,seccomp 317 354,security 185 -,select 23 82,semctl 66 394,semget 64 393,semop 65 -,\
    semtimedop 220 -,semtimedop_time64 - 420,sendfile 40 187,sendfile64 - 239,sendmmsg 307 345 538,\
    sendmsg 46 370 518,sendto 44 369,set_mempolicy 238 276,set_mempolicy_home_node 450 450,\
    set_robust_list 273 311 530,set_thread_area 205 243,set_tid_address 218 258,setdomainname 171 121,\
    setfsgid 123 139,setfsgid32 - 216,setfsuid 122 138,setfsuid32 - 215,setgid 106 46,setgid32 - 214,\
    setgroups 116 81,setgroups32 - 206,sethostname 170 74,setitimer 38 104,setns 308 346,setpgid 109 57,\
    setpriority 141 97,setregid 114 71,setregid32 - 204,setresgid 119 170,setresgid32 - 210,setresuid 117 164,\
    setresuid32 - 208,setreuid 113 70,setreuid32 - 203,setrlimit 160 75,setsid 112 66,setsockopt 54 366 541,\
    settimeofday 164 79,setuid 105 23,setuid32 - 213,setxattr 188 226,setxattrat 463 463,sgetmask - 68,shmat 30 397,\
    shmctl 31 396,shmdt 67 398,shmget 29 395,shutdown 48 373,sigaction - 67,sigaltstack 131 186 525,signal - 48,\
    signalfd 282 321,signalfd4 289 327,sigpending - 73,sigprocmask - 126,sigreturn - 119,sigsuspend - 72,\
    socket 41 359,socketcall - 102,socketpair 53 360,splice 275 313,ssetmask - 69,stat 4 106,stat64 - 195,\
    statfs 137 99,statfs64 - 268,statmount 457 457,statx 332 383,stime - 25,stty - 31,swapoff 168 115,swapon 167 87,\
    symlink 88 83,symlinkat 266 304,sync 162 36,sync_file_range 277 314,syncfs 306 344,sysfs 139 135,sysinfo 99 116,\
    syslog 103 103,tee 276 315,tgkill 234 270,time 201 13,timer_create 222 259 526,timer_delete 226 263,\
    timer_getoverrun 225 262,timer_gettime 224 261,timer_gettime64 - 408,timer_settime 223 260,timer_settime64 - 409,\
    timerfd_create 283 322,timerfd_gettime 287 326,timerfd_gettime64 - 410,timerfd_settime 286 325,\
    timerfd_settime64 - 411,times 100 43,tkill 200 238,truncate 76 92,truncate64 - 193,tuxcall 184 -,\
    ugetrlimit - 191,ulimit - 58,umask 95 60,umount - 22,umount2 166 52,uname 63 122,unlink 87 10,unlinkat 263 301,\
    unshare 272 310,uprobe 336 -,uretprobe 335 -,uselib 134 86,userfaultfd 323 374,ustat 136 62,utime 132 30,\
    utimensat 280 320,utimensat_time64 - 412,utimes 235 271,vfork 58 190,vhangup 153 111,vm86 - 166,vm86old - 113,\
    vmsplice 278 316 532,vserver 236 273,wait4 61 114,waitid 247 284 529,waitpid - 7,write 1 4,writev 20 146 516";

/// `name number`.
#[cfg(target_arch = "aarch64")]
#[rustfmt::skip]
const TABLE: &str = "\
    accept 202,accept4 242,acct 89,add_key 217,adjtimex 171,bind 200,bpf 280,brk 214,cachestat 451,capget 90,\
    capset 91,chdir 49,chroot 51,clock_adjtime 266,clock_getres 114,clock_gettime 113,clock_nanosleep 115,\
    clock_settime 112,clone 220,clone3 435,close 57,close_range 436,connect 203,copy_file_range 285,\
    delete_module 106,dup 23,dup3 24,epoll_create1 20,epoll_ctl 21,epoll_pwait 22,epoll_pwait2 441,eventfd2 19,\
    execve 221,execveat 281,exit 93,exit_group 94,faccessat 48,faccessat2 439,fadvise64 223,fallocate 47,\
    fanotify_init 262,fanotify_mark 263,fchdir 50,fchmod 52,fchmodat 53,fchmodat2 452,fchown 55,fchownat 54,fcntl 25,\
    fdatasync 83,fgetxattr 10,file_getattr 468,file_setattr 469,finit_module 273,flistxattr 13,flock 32,\
    fremovexattr 16,fsconfig 431,fsetxattr 7,fsmount 432,fsopen 430,fspick 433,fstat 80,fstatfs 44,fsync 82,\
    ftruncate 46,futex 98,futex_requeue 456,futex_wait 455,futex_waitv 449,futex_wake 454,get_mempolicy 236,\
    get_robust_list 100,getcpu 168,getcwd 17,getdents64 61,getegid 177,geteuid 175,getgid 176,getgroups 158,\
    getitimer 102,getpeername 205,getpgid 155,getpid 172,getppid 173,getpriority 141,getrandom 278,getresgid 150,\
    getresuid 148,getrlimit 163,getrusage 165,getsid 156,getsockname 204,getsockopt 209,gettid 178,gettimeofday 169,\
    getuid 174,getxattr 8,getxattrat 464,init_module 105,inotify_add_watch 27,inotify_init1 26,inotify_rm_watch 28,\
    io_cancel 3,io_destroy 1,io_getevents 4,io_pgetevents 292,io_setup 0,io_submit 2,io_uring_enter 426,\
    io_uring_register 427,io_uring_setup 425,ioctl 29,ioprio_get 31,ioprio_set 30,kcmp 272,kexec_file_load 294,\
    kexec_load 104,keyctl 219,kill 129,landlock_add_rule 445,landlock_create_ruleset 444,landlock_restrict_self 446,\
    lgetxattr 9,linkat 37,listen 201,listmount 458,listxattr 11,listxattrat 465,llistxattr 12,lookup_dcookie 18,\
    lremovexattr 15,lseek 62,lsetxattr 6,lsm_get_self_attr 459,lsm_list_modules 461,lsm_set_self_attr 460,\
    madvise 233,map_shadow_stack 453,mbind 235,membarrier 283,memfd_create 279,memfd_secret 447,migrate_pages 238,\
    mincore 232,mkdirat 34,mknodat 33,mlock 228,mlock2 284,mlockall 230,mmap 222,mount 40,mount_setattr 442,\
    move_mount 429,move_pages 239,mprotect 226,mq_getsetattr 185,mq_notify 184,mq_open 180,mq_timedreceive 183,\
    mq_timedsend 182,mq_unlink 181,mremap 216,mseal 462,msgctl 187,msgget 186,msgrcv 188,msgsnd 189,msync 227,\
    munlock 229,munlockall 231,munmap 215,name_to_handle_at 264,nanosleep 101,newfstatat 79,nfsservctl 42,\
    open_by_handle_at 265,open_tree 428,open_tree_attr 467,openat 56,openat2 437,perf_event_open 241,personality 92,\
    pidfd_getfd 438,pidfd_open 434,pidfd_send_signal 424,pipe2 59,pivot_root 41,pkey_alloc 289,pkey_free 290,\
    pkey_mprotect 288,ppoll 73,prctl 167,pread64 67,preadv 69,preadv2 286,prlimit64 261,process_madvise 440,\
    process_mrelease 448,process_vm_readv 270,process_vm_writev 271,pselect6 72,ptrace 117,pwrite64 68,pwritev 70,\
    pwritev2 287,quotactl 60,quotactl_fd 443,read 63,readahead 213,readlinkat 78,readv 65,reboot 142,recvfrom 207,\
    recvmmsg 243,recvmsg 212,remap_file_pages 234,removexattr 14,removexattrat 466,renameat 38,renameat2 276,\
    request_key 218,restart_syscall 128,rseq 293,rt_sigaction 134,rt_sigpending 136,rt_sigprocmask 135,\
    rt_sigqueueinfo 138,rt_sigreturn 139,rt_sigsuspend 133,rt_sigtimedwait 137,rt_tgsigqueueinfo 240,\
    sched_get_priority_max 125,sched_get_priority_min 126,sched_getaffinity 123,sched_getattr 275,sched_getparam 121,\
    sched_getscheduler 120,sched_rr_get_interval 127,sched_setaffinity 122,sched_setattr 274,sched_setparam 118,\
    sched_setscheduler 119,sched_yield 124,seccomp 277,semctl 191,semget 190,semop 193,semtimedop 192,sendfile 71,\
    sendmmsg 269,sendmsg 211,sendto 206,set_mempolicy 237,set_mempolicy_home_node 450,set_robust_list 99,\
    set_tid_address 96,setdomainname 162,setfsgid 152,setfsuid 151,setgid 144,setgroups 159,sethostname 161,\
    setitimer 103,setns 268,setpgid 154,setpriority 140,setregid 143,setresgid 149,setresuid 147,setreuid 145,\
    setrlimit 164,setsid 157,setsockopt 208,settimeofday 170,setuid 146,setxattr 5,setxattrat 463,shmat 196,\
    shmctl 195,shmdt 197,shmget 194,shutdown 210,sigaltstack 132,signalfd4 74,socket 198,socketpair 199,splice 76,\
    statfs 43,statmount 457,statx 291,swapoff 225,swapon 224,symlinkat 36,sync 81,sync_file_range 84,\
    sync_file_range2 84,syncfs 267,sysinfo 179,syslog 116,tee 77,tgkill 131,timer_create 107,timer_delete 111,\
    timer_getoverrun 109,timer_gettime 108,timer_settime 110,timerfd_create 85,timerfd_gettime 87,timerfd_settime 86,\
    times 153,tkill 130,truncate 45,umask 166,umount2 39,uname 160,unlinkat 35,unshare 97,userfaultfd 282,\
    utimensat 88,vhangup 58,vmsplice 75,wait4 260,waitid 95,write 64,writev 66";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_found_and_the_table_is_sorted() {
        let names: Vec<&str> = TABLE.split(',').map(|entry| entry.split(' ').next().unwrap()).collect();
        assert!(names.len() > 300 && names.len() == ENTRIES);
        assert!(names.windows(2).all(|pair| pair[0] < pair[1]));
        for entry in TABLE.split(',') {
            let (name, fields) = entry.split_once(' ').unwrap();
            assert_eq!(find(name.as_bytes()), Some(fields.as_bytes()), "{name}");
        }
    }

    #[test]
    fn unknown_names_have_no_number() {
        for name in
            ["", "a", "zzz", "rea", "readx", "read 0", "read ", "read 0 3", ",", "write,", "writev 20 146xxxxxxx"]
        {
            assert_eq!(numbers(name), Numbers::default(), "{name:?}");
        }
    }

    #[test]
    fn numbers_agree_with_the_c_headers() {
        for (name, expected) in [
            ("accept", libc::SYS_accept),
            ("openat2", libc::SYS_openat2),
            ("clone3", libc::SYS_clone3),
            ("writev", libc::SYS_writev),
            ("mount_setattr", libc::SYS_mount_setattr),
            ("futex_waitv", libc::SYS_futex_waitv),
        ] {
            assert_eq!(numbers(name).native, u32::try_from(expected).ok(), "{name}");
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn each_abi_has_its_own_numbers() {
        let on = |name: &str| {
            let found = numbers(name);
            (found.native, found.x86, found.x32)
        };
        assert_eq!(on("read"), (Some(0), Some(3), Some(0)));
        assert_eq!(on("ioctl"), (Some(16), Some(54), Some(514)));
        assert_eq!(on("socketcall"), (None, Some(102), None));
        assert_eq!(on("arch_prctl"), (Some(158), Some(384), Some(158)));
        assert_eq!(on("tuxcall"), (Some(184), None, Some(184)));
        assert_eq!(on("mseal"), (Some(462), Some(462), Some(462)));
    }
}
