"""Copies the kernel parameters of a network namespace for the guest that takes its place.

A container without a virtual machine would see them: whether an interface accepts router advertisements, forwards, or
has IPv6 at all (Docker switches that off), and the values set by CNI's plugin "tuning". Only values that differ from
the guest kernel's defaults are sent. Names are paths below ``/proc/sys/net``. Everything applies to the network
namespace of the calling thread.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_TOP = "/proc/sys/net"
_GROUPS = (
    "core",
    "ipv4",
    "ipv4/route",
    "ipv6",
    "ipv6/icmp",
    "ipv6/route",
    "unix",
    *(
        f"{family}/{kind}/{name}"
        for name in ("all", "default")
        for family in ("ipv4", "ipv6")
        for kind in ("conf", "neigh")
    ),
    "ipv4/conf/lo",
    "ipv6/conf/lo",
)
"""The order matters: setting forwarding resets other parameters, and values for all interfaces change each of them."""
_FIRST = ("ipv4/ip_forward",)
_MAX_BYTES = 4096

_CARRIED_CORE = frozenset({"somaxconn", "optmem_max", "txrehash"})
_SCALED = frozenset({"tcp_max_tw_buckets", "tcp_max_syn_backlog"})
"""Parameters whose defaults the kernel derives from the host's memory."""
_NOT_CARRIED = _SCALED | {
    # Read-only, or secret.
    *("tcp_available_congestion_control", "tcp_allowed_congestion_control", "tcp_available_ulp"),
    *("tcp_ehash_entries", "tcp_child_ehash_entries", "udp_hash_entries", "udp_child_hash_entries"),
    *("tcp_fastopen_key", "tcp_challenge_ack_limit", "fib_multipath_hash_seed", "nexthop_compat_mode"),
    *("xfrm4_gc_thresh", "xfrm6_gc_thresh", "flush", "gc_thresh", "tcp_mem", "udp_mem"),
    # Of an interface: follows its MTU, or is an identity.
    *("mtu", "ioam6_id", "ioam6_id_wide"),
}
_ALWAYS = frozenset(
    {"accept_ra", "disable_ipv6", "forwarding", "addr_gen_mode", "ignore_routes_with_linkdown"}
)
"""Sent for each interface even if they have their defaults: a value for all interfaces may have changed them."""

_CONF = {
    "ipv4": "accept_redirects=1 accept_source_route=1 arp_evict_nocarrier=1 igmpv2_unsolicited_report_interval=10000"
    " igmpv3_unsolicited_report_interval=1000 secure_redirects=1 send_redirects=1 shared_media=1",
    "ipv6": "accept_dad=1 accept_ra=1 accept_ra_defrtr=1 accept_ra_min_hop_limit=1 accept_ra_mtu=1 accept_ra_pinfo=1"
    " accept_ra_rtr_pref=1 router_probe_interval=60 accept_redirects=1 autoconf=1 dad_transmits=1 enhanced_dad=1"
    " hop_limit=64 max_addresses=16 max_desync_factor=600 mldv1_unsolicited_report_interval=10000"
    " mldv2_unsolicited_report_interval=1000 ndisc_evict_nocarrier=1 ra_defrtr_metric=1024 regen_max_retry=3"
    " regen_min_advance=2 router_solicitation_delay=1 router_solicitation_interval=4"
    " router_solicitation_max_interval=3600 router_solicitations=-1 suppress_frag_ndisc=1 temp_prefered_lft=86400"
    " temp_valid_lft=604800",
}
_OTHERS = {
    "core": "somaxconn=4096 optmem_max=131072 txrehash=1",
    "unix": "max_dgram_qlen=10",
    "ipv4": "fib_multipath_hash_fields=7 icmp_echo_ignore_broadcasts=1 icmp_ignore_bogus_error_responses=1"
    " icmp_msgs_burst=50 icmp_msgs_per_sec=1000 icmp_ratelimit=1000 icmp_ratemask=6168"
    " igmp_link_local_mcast_reports=1 igmp_max_memberships=20 igmp_max_msf=10 igmp_qrv=2 ip_default_ttl=64"
    " ip_early_demux=1 ip_forward_update_priority=1 ip_local_port_range=32768,60999 ip_local_reserved_ports="
    " ip_unprivileged_port_start=1024 ipfrag_high_thresh=4194304 ipfrag_low_thresh=3145728 ipfrag_max_dist=64"
    " ipfrag_time=30 ping_group_range=1,0 raw_l3mdev_accept=1 tcp_adv_win_scale=1 tcp_app_win=31 tcp_autocorking=1"
    " tcp_backlog_ack_defer=1 tcp_base_mss=1024 tcp_comp_sack_delay_ns=1000000 tcp_comp_sack_nr=44"
    " tcp_comp_sack_rtt_percent=33 tcp_comp_sack_slack_ns=100000 tcp_congestion_control=cubic tcp_dsack=1"
    " tcp_early_demux=1 tcp_early_retrans=3 tcp_ecn=2 tcp_ecn_fallback=1 tcp_ecn_option=2 tcp_ecn_option_beacon=3"
    " tcp_fastopen=1 tcp_fin_timeout=60 tcp_frto=2 tcp_invalid_ratelimit=500 tcp_keepalive_intvl=75"
    " tcp_keepalive_probes=9 tcp_keepalive_time=7200 tcp_limit_output_bytes=1048576 tcp_max_reordering=300"
    " tcp_min_rtt_wlen=300 tcp_min_snd_mss=48 tcp_min_tso_segs=2 tcp_moderate_rcvbuf=1 tcp_mtu_probe_floor=48"
    " tcp_no_ssthresh_metrics_save=1 tcp_notsent_lowat=4294967295 tcp_pacing_ca_ratio=120 tcp_pacing_ss_ratio=200"
    " tcp_pingpong_thresh=1 tcp_plb_cong_thresh=128 tcp_plb_idle_rehash_rounds=3 tcp_plb_rehash_rounds=12"
    " tcp_plb_suspend_rto_sec=60 tcp_probe_interval=600 tcp_probe_threshold=8 tcp_recovery=1 tcp_reordering=3"
    " tcp_retrans_collapse=1 tcp_retries1=3 tcp_retries2=15 tcp_rmem=4096,131072,6291456 tcp_rto_max_ms=120000"
    " tcp_rto_min_us=200000 tcp_sack=1 tcp_slow_start_after_idle=1 tcp_syn_linear_timeouts=4 tcp_syn_retries=6"
    " tcp_synack_retries=5 tcp_syncookies=1 tcp_timestamps=1 tcp_tso_rtt_log=9 tcp_tso_win_divisor=3 tcp_tw_reuse=2"
    " tcp_tw_reuse_delay=1000 tcp_window_scaling=1 tcp_wmem=4096,16384,4194304 udp_early_demux=1 udp_rmem_min=4096"
    " udp_wmem_min=4096",
    "ipv4/route": "error_burst=1250 error_cost=250 min_adv_mss=256 min_pmtu=552 mtu_expires=600 redirect_load=5"
    " redirect_number=9 redirect_silence=5120 gc_elasticity=8 gc_interval=60 gc_min_interval_ms=500 gc_timeout=300"
    " max_size=2147483647",
    "ipv6": "auto_flowlabels=1 fib_multipath_hash_fields=7 flowlabel_consistency=1 idgen_delay=1 idgen_retries=3"
    " ip6frag_high_thresh=4194304 ip6frag_low_thresh=3145728 ip6frag_time=60 max_dst_opts_length=2147483647"
    " max_dst_opts_number=8 max_hbh_length=2147483647 max_hbh_opts_number=8",
    "ipv6/icmp": "ratelimit=1000 ratemask=0-1,3-127",
    "ipv6/route": "gc_elasticity=9 gc_interval=30 gc_min_interval_ms=500 gc_timeout=60 max_size=2147483647"
    " min_adv_mss=1220 mtu_expires=600",
}
"""The guest kernel's defaults; a parameter that is not listed has 0. A comma stands for white space between numbers."""
_NEIGHBOR = (
    "anycast_delay=100 app_solicit=0 base_reachable_time=30 base_reachable_time_ms=30000 delay_first_probe_time=5"
    " gc_interval=30 gc_stale_time=60 gc_thresh1=128 gc_thresh2=512 gc_thresh3=1024 interval_probe_time_ms=5000"
    " locktime=100 mcast_resolicit=0 mcast_solicit=3 proxy_delay=80 proxy_qlen=64 retrans_time=100 retrans_time_ms=1000"
    " ucast_solicit=3 unres_qlen=101 unres_qlen_bytes=212992"
)
_NEIGHBOR_TWICE = frozenset(
    {"base_reachable_time", "retrans_time", "unres_qlen", "gc_thresh1", "gc_thresh2", "gc_thresh3"}
)
"""Not sent: other parameters say the same in finer units, or the value is common to all namespaces."""
_SPECIAL = {
    "ipv4/conf/all/accept_source_route": "0",
    "ipv4/conf/lo/disable_policy": "1",
    "ipv4/conf/lo/disable_xfrm": "1",
    "ipv6/conf/all/accept_dad": "0",
    "ipv6/conf/lo/accept_dad": "-1",
    "ipv6/conf/lo/use_tempaddr": "-1",
    "ipv6/neigh/locktime": "0",
}


def of_namespace() -> dict[str, str]:
    """Parameters of the whole namespace that differ from the guest's defaults, in the order in which to set them."""
    found = {name: value for name, value in _differing("ipv4") if name in _FIRST}
    for group in _GROUPS:
        found.update(_differing(group))
    return found


def of_interface(name: str) -> dict[str, str]:
    """Parameters of one interface that differ from the guest's defaults, in the order in which to set them."""
    found: dict[str, str] = {}
    for family in ("ipv4", "ipv6"):
        for kind in ("conf", "neigh"):
            found.update(_differing(f"{family}/{kind}/{name}"))
    return found


def changes(wanted: Mapping[str, str], told: Mapping[str, str]) -> dict[str, str]:
    """What to send to the guest now, including parameters that have their defaults again.

    Args:
        wanted: The parameters that differ from their defaults.
        told: The parameters that were sent before.
    """
    back = {name: default(name) for name in told if name not in wanted}
    return {name: value for name, value in {**wanted, **back}.items() if told.get(name) != value}


def reaches_all(name: str) -> bool:
    """Whether setting this parameter may change those of the interfaces."""
    return "/conf/all/" in name or name in _FIRST


def default(name: str) -> str:
    """The guest kernel's default value of a parameter."""
    if name in _SPECIAL:
        return _SPECIAL[name]
    group, _, last = name.rpartition("/")
    parts = group.split("/")
    if len(parts) == 3 and parts[1] == "conf":
        return _table(_CONF[parts[0]]).get(last, "0")
    if len(parts) == 3 and parts[1] == "neigh":
        return _SPECIAL.get(f"{parts[0]}/neigh/{last}") or _table(_NEIGHBOR).get(last, "0")
    return _table(_OTHERS.get(group, "")).get(last, "0")


def path(dotted: str) -> str:
    """The path of a parameter in sysctl(8)'s form (``net.ipv4.ip_forward``); empty if it is not one of the network."""
    swapped = dotted.translate({ord("."): "/", ord("/"): "."})
    return swapped.removeprefix("net/") if swapped.startswith("net/") else ""


_TABLES: dict[str, dict[str, str]] = {}


def _table(text: str) -> dict[str, str]:
    if text not in _TABLES:
        pairs = (pair.partition("=") for pair in text.split())
        _TABLES[text] = {
            name: value.replace(",", " ") if name != "ratemask" else value for name, _, value in pairs
        }
    return _TABLES[text]


def _differing(group: str) -> Iterator[tuple[str, str]]:
    try:
        names = sorted(os.listdir(f"{_TOP}/{group}"))
    except OSError:
        return  # a kernel without it: IPv6, or an interface that is gone
    is_conf = "/conf/" in group
    is_interface = is_conf and not group.endswith("/all")
    for name in names:
        if name in _NOT_CARRIED or (group == "core" and name not in _CARRIED_CORE):
            continue
        if "/neigh/" in group and name in _NEIGHBOR_TWICE:
            continue
        full = f"{group}/{name}"
        value = _read(full)
        if value is None:
            continue
        if value != default(full) or (is_interface and name in _ALWAYS):
            yield full, value


def _read(name: str) -> str | None:
    """The value of a parameter; None if it has none, or cannot be set."""
    try:
        fd = os.open(f"{_TOP}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None  # it has just disappeared, or is write-only
    try:
        return " ".join(os.read(fd, _MAX_BYTES).decode("ascii", "replace").split())
    except OSError:
        return None  # a directory, or a secret that is not set
    finally:
        os.close(fd)
