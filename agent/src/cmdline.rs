//! Settings: the kernel command line of the guest, or the arguments of an ordinary process.

use crate::log::Level;
use crate::pci_path::PciPath;
use crate::prelude::*;
use crate::server::listen::Address;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    pub address: Address,
    pub level: Level,
    /// Size of the pipes of a container's streams in bytes; 0 = the agent's default.
    pub pipe_size: u32,
    /// Whether clients of the agent may open a shell in the guest.
    pub debug_console: bool,
    /// Further listeners for that shell, and for the log.
    pub console_address: Option<Address>,
    pub log_address: Option<Address>,
    /// Whether calls of callers that trace are recorded.
    pub trace: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            address: Address::Any,
            level: Level::Info,
            pipe_size: 0,
            debug_console: false,
            console_address: None,
            log_address: None,
            trace: false,
        }
    }
}

/// Parameters of the original agent for features that this one lacks: pulling images in the guest, confidential
/// computing, streams by passed descriptors, a configuration file.
const UNSUPPORTED: &[&str] = &[
    "cdh_api_timeout",
    "cdi_timeout",
    "config_file",
    "devmode",
    "enable_signature_verification",
    "guest_components_procs",
    "guest_components_rest_api",
    "https_proxy",
    "image_policy_file",
    "image_pull_timeout",
    "image_registry_auth",
    "launch_process_timeout",
    "mem_agent_enable",
    "no_proxy",
    "passfd_listener_port",
    "secure_image_storage_integrity",
    "secure_storage_integrity",
    "visible_cdi_devices",
];

/// Reads `agent.*` parameters; unknown and invalid ones are returned as sentences for the log. They are not fatal: a
/// typing error must not keep a guest from booting.
pub fn parse_kernel(cmdline: &str) -> (Settings, Vec<String>) {
    let mut settings = Settings::default();
    let mut warnings = vec![];
    for word in cmdline.split_ascii_whitespace() {
        // Both hierarchies would be mounted by the kernel; containers get cgroup v2 in any case.
        if word == "systemd.unified_cgroup_hierarchy=0" {
            warnings.push(format!("kernel parameter {word:?} is ignored: control groups are v2 here"));
        }
        let Some(parameter) = word.strip_prefix("agent.") else { continue };
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        let outcome = match name {
            "log" => Level::parse(value)
                .map(|level| settings.level = level)
                .ok_or_else(|| "is not fatal, critical, error, warn, info, debug or trace".to_string()),
            "channel" if value == "serial" || value == "vsock" => {
                Address::parse(value).map(|address| settings.address = address).map_err(|e| e.message)
            }
            "channel" => Err("is neither serial nor vsock".to_string()),
            "server_addr" => Address::parse(value).map(|address| settings.address = address).map_err(|e| e.message),
            "debug_console" => {
                settings.debug_console = true;
                Ok(())
            }
            "trace" => match value {
                "" | "true" | "1" => {
                    settings.trace = true;
                    Ok(())
                }
                "false" | "0" => Ok(()),
                _ => Err("is neither true nor false".to_string()),
            },
            "debug_console_vport" | "log_vport" => match value.parse() {
                Ok(port) => {
                    let address = Some(Address::Vsock(port));
                    if name == "log_vport" {
                        settings.log_address = address;
                    } else {
                        settings.console_address = address;
                    }
                    Ok(())
                }
                Err(_) => Err("is not a vsock port".to_string()),
            },
            "container_pipe_size" => match value.parse() {
                Ok(size) => {
                    settings.pipe_size = size;
                    Ok(())
                }
                Err(_) => Err("is not a number of bytes".to_string()),
            },
            // Read where a device is waited for (`uevent::hotplug_timeout_ms`).
            "hotplug_timeout" => value.parse::<u64>().map(drop).map_err(|_| "is not a number of seconds".to_string()),
            // Read where the share is looked for (`pci_scan::share`).
            "pci_scan" => PciPath::parse(value).map(drop).map_err(|_| "is no PCI path".to_string()),
            _ if UNSUPPORTED.contains(&name) || name.starts_with("mem_agent_") => {
                Err("is not supported by this agent".to_string())
            }
            _ => Err("is not a parameter of this agent".to_string()),
        };
        if let Err(why) = outcome {
            warnings.push(format!("kernel parameter {word:?} is ignored: {why}"));
        }
    }
    (settings, warnings)
}

/// What the command line of an ordinary process asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    Serve(Settings),
    Version,
    Help,
}

pub const USAGE: &str = "usage: kata-agent --server unix:///PATH|vsock://-1:PORT [--log LEVEL] [--log-server ADDRESS]
                  [--debug-console[=ADDRESS]]
       kata-agent --version

Without arguments, as PID 1, it is the init of a guest.
";

/// Whether only the version is asked for, also by process 1: of a container, in which this program runs to try one out.
/// No kernel gives its init this.
pub fn asks_version(arguments: &[String]) -> bool {
    matches!(arguments, [_, option] if option == "--version")
}

pub fn parse_arguments(arguments: &[String]) -> Result<Command> {
    let mut settings = Settings::default();
    let mut rest = arguments.iter().skip(1);
    let mut addressed = false;
    while let Some(option) = rest.next() {
        let (name, mut value) = match option.split_once('=') {
            Some((name, value)) => (name, Some(value.to_string())),
            None => (option.as_str(), None),
        };
        let mut take = || {
            value.take().or_else(|| rest.next().cloned()).ok_or_else(|| Error::invalid(format!("{name} needs a value")))
        };
        match name {
            "--version" | "-V" => return Ok(Command::Version),
            "--help" | "-h" => return Ok(Command::Help),
            "--server" => {
                settings.address = Address::parse(&take()?)?;
                addressed = true;
            }
            "--debug-console" => {
                settings.debug_console = true;
                settings.console_address = value.take().map(|text| Address::parse(&text)).transpose()?;
            }
            "--log-server" => settings.log_address = Some(Address::parse(&take()?)?),
            "--log" => {
                let level = take()?;
                settings.level =
                    Level::parse(&level).ok_or_else(|| Error::invalid(format!("unknown level {level:?}")))?;
            }
            _ => return Err(Error::invalid(format!("unknown option {option:?}"))),
        }
    }
    if addressed {
        Ok(Command::Serve(settings))
    } else {
        Err(Error::invalid("--server is missing"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_asked_for_alone() {
        let told = |words: &[&str]| asks_version(&words.iter().copied().map(String::from).collect::<Vec<_>>());
        assert!(told(&["/proc/self/exe", "--version"]));
        assert!(!told(&["/init"]) && !told(&["/init", "splash"]) && !told(&["/init", "--version", "splash"]));
    }

    #[test]
    fn kernel_parameters_are_read_and_wrong_ones_named() {
        let (settings, warnings) = parse_kernel(
            "quiet agent.log=debug agent.server_addr=vsock://-1:1025 agent.container_pipe_size=1048576 agent.new=1\n",
        );
        assert_eq!(settings.level, Level::Debug);
        assert_eq!(settings.address, Address::Vsock(1025));
        assert_eq!(settings.pipe_size, 1 << 20);
        assert_eq!(warnings, ["kernel parameter \"agent.new=1\" is ignored: is not a parameter of this agent"]);
        assert_eq!(parse_kernel("agent.channel=serial").0.address, Address::Serial);
        let (debug, warnings) = parse_kernel("agent.debug_console agent.debug_console_vport=1026 agent.log_vport=1025");
        assert!(debug.debug_console && warnings.is_empty());
        assert_eq!(debug.console_address, Some(Address::Vsock(1026)));
        assert_eq!(debug.log_address, Some(Address::Vsock(1025)));
        let wrong = "agent.channel=tin agent.log=x agent.container_pipe_size=y agent.hotplug_timeout=soon";
        assert_eq!(parse_kernel(wrong).1.len(), 4);
        assert!(parse_kernel("agent.hotplug_timeout=7 systemd.unified_cgroup_hierarchy=1").1.is_empty());
        assert!(parse_kernel("agent.trace").0.trace && parse_kernel("agent.trace=true").0.trace);
        assert!(!parse_kernel("agent.trace=false").0.trace && parse_kernel("agent.trace=2").1.len() == 1);
        let unsupported =
            parse_kernel("agent.devmode agent.mem_agent_memcg_swap=1 systemd.unified_cgroup_hierarchy=0").1;
        assert_eq!(unsupported.len(), 3);
        assert!(unsupported[0].ends_with("is not supported by this agent") && unsupported[2].contains("v2"));
    }

    #[test]
    fn arguments_of_an_ordinary_process() {
        let parse = |text: &str| parse_arguments(&text.split(' ').map(ToString::to_string).collect::<Vec<_>>());
        let Ok(Command::Serve(settings)) = parse("kata-agent --server unix:///tmp/s --log=debug") else { panic!() };
        assert_eq!(settings.address, Address::Unix("/tmp/s".into()));
        assert_eq!(parse("kata-agent -V"), Ok(Command::Version));
        assert!(
            parse("kata-agent").is_err() && parse("kata-agent --server").is_err() && parse("kata-agent x").is_err()
        );
    }
}
