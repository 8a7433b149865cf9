//! Links the agent without a C library.
//!
//! The `libc` crate (used for constants and structures only) asks the linker for `-lc` and friends. Empty archives
//! found first make every accidental call of a C function a link error, instead of 700 KB of glibc whose start-up
//! code never ran.

use std::{env, fs, path::PathBuf};

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let dir = out.join("nolibc");
    fs::create_dir_all(&dir).expect("create the directory of empty archives");
    for name in ["c", "m", "rt", "pthread", "util", "dl", "gcc", "gcc_eh", "gcc_s"] {
        fs::write(dir.join(format!("lib{name}.a")), "!<arch>\n").expect("write an empty archive");
    }
    println!("cargo:rustc-link-arg-bins=-L{}", dir.display());
    // Nothing unwinds (panic=abort), but the precompiled `core` and `alloc` bring 70 KB of tables for it.
    let script = out.join("discard.ld");
    fs::write(&script, "SECTIONS { /DISCARD/ : { *(.eh_frame .eh_frame.* .gcc_except_table .gcc_except_table.* .comment) } } INSERT BEFORE .text;\n").expect("write the linker script");
    println!("cargo:rustc-link-arg-bins=-Wl,-T,{}", script.display());
    for arg in [
        "-nostartfiles",
        "-static",
        "-Wl,--gc-sections",
        "-Wl,-z,noseparate-code",
        "-Wl,--build-id=none",
        "-Wl,--no-eh-frame-hdr",
    ] {
        println!("cargo:rustc-link-arg-bins={arg}");
    }
    println!("cargo:rerun-if-changed=build.rs");
}
