"""The KVM lab: an emulated machine with an emulated AMD-V, in which /dev/kvm and /dev/vhost-vsock work.

`main` has the command, `assets` the lab's kernel and initrd, `machine` its QEMU, `session` the talk with it.
`inside` (with `frames`) is copied into the initrd and runs in the lab, so it imports nothing else of ours.
"""
