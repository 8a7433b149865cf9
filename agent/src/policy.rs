//! Which requests the agent answers, and with what in them (SetPolicy). The form is described in docs/agent-policy.md.
//!
//! Requests are judged on the wire, before they are decoded, by the names of the protocol's definition. A request that
//! could be understood in two ways (a single field twice, a field of another type) is refused where a rule looks at it.

use crate::json::{self, Value};
use crate::prelude::*;
use crate::proto::agent::AGENT_SERVICE;
use crate::proto::codec::{self, Value as Content};
use crate::proto::health::HEALTH;
use crate::proto::schema::{MESSAGES, METHODS};
use core::fmt::Write;

/// A policy larger than this is not kept in the guest.
const MAX_POLICY: usize = 64 << 10;
/// How much of a refused value the error shows.
const MAX_SHOWN: usize = 64;

/// A checked policy: the object `allow`.
pub struct Policy(Vec<(String, Value)>);

/// One field of the definition.
#[derive(Clone, Copy)]
struct Field<'a> {
    number: u32,
    repeated: bool,
    kind: Kind<'a>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind<'a> {
    Text,
    Bytes,
    Bool,
    Signed,
    Unsigned,
    Message(&'a str),
}

impl Policy {
    pub fn parse(text: &str) -> Result<Policy> {
        if text.len() > MAX_POLICY {
            return Err(Error::invalid(format!("policy: more than {MAX_POLICY} bytes")));
        }
        let document = json::parse(text).context("policy")?;
        let invalid = |what: &str| Error::invalid(format!("policy: {what}"));
        let Value::Object(members) = document else { return Err(invalid("it is no object")) };
        let mut allow = None;
        for (name, value) in members {
            match (name.as_str(), value) {
                ("version", Value::Number(1)) => {}
                ("version", _) => return Err(invalid("its version is not 1")),
                ("allow", Value::Object(methods)) => allow = Some(methods),
                (name, _) => return Err(invalid(&format!("unknown or malformed member {name:?}"))),
            }
        }
        let allow = allow.ok_or_else(|| invalid("it has no member \"allow\""))?;
        for (method, rules) in &allow {
            check_rules(method, rules).with_context(|| format!("policy: {method}"))?;
        }
        Ok(Policy(allow))
    }

    /// `PERMISSION_DENIED`, naming the rules, for a request that is not allowed.
    pub fn check(&self, service: &str, method: &str, payload: &[u8]) -> Result<()> {
        if service == HEALTH {
            return Ok(());
        }
        let name = if service == AGENT_SERVICE { method.to_string() } else { format!("{service}/{method}") };
        let find = |wanted: &str| self.0.iter().find(|(known, _)| known == wanted).map(|(_, rules)| rules);
        let rules = match find(&name).or_else(|| find("*")) {
            Some(Value::Bool(true)) => return Ok(()),
            Some(Value::List(rules)) => &rules[..],
            _ => &[],
        };
        let mut why = String::new();
        for rule in rules {
            match judge(rule, &name, payload) {
                Ok(()) => return Ok(()),
                Err(reason) => {
                    let _ = write!(why, "{}rule {:?}: {reason}", if why.is_empty() { "" } else { "; " }, label(rule));
                }
            }
        }
        let why = if why.is_empty() { "no rule allows it".to_string() } else { why };
        Err(Error::denied(format!("the policy refuses {name}: {why}")))
    }
}

fn member<'a>(object: &'a Value, name: &str) -> Option<&'a Value> {
    let Value::Object(members) = object else { return None };
    members.iter().find(|(known, _)| known == name).map(|(_, value)| value)
}

fn label(rule: &Value) -> &str {
    match member(rule, "rule") {
        Some(Value::Text(name)) => name,
        _ => "",
    }
}

fn conditions(rule: &Value) -> &[(String, Value)] {
    match member(rule, "where") {
        Some(Value::Object(conditions)) => conditions,
        _ => &[],
    }
}

// ---- the definition ----

/// The request of a method, written as in a policy.
fn request_of(method: &str) -> Option<&'static str> {
    METHODS.iter().find(|(known, _)| *known == method).map(|(_, request)| *request)
}

fn field<'a>(message: &str, name: &str) -> Option<Field<'a>> {
    let (_, fields) = MESSAGES.iter().find(|(known, _)| *known == message)?;
    let text = fields.split(' ').find_map(|field| field.strip_prefix(name)?.strip_prefix(':'))?;
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, kind) = text.split_at(digits);
    let (repeated, kind) = kind.strip_prefix('*').map_or((false, kind), |kind| (true, kind));
    let kind = match kind {
        "s" => Kind::Text,
        "y" => Kind::Bytes,
        "b" => Kind::Bool,
        "i" => Kind::Signed,
        "u" => Kind::Unsigned,
        message => Kind::Message(message.strip_prefix('m')?),
    };
    Some(Field { number: number.parse().ok()?, repeated, kind })
}

// ---- checking a policy ----

fn check_rules(method: &str, rules: &Value) -> Result<()> {
    let request = request_of(method);
    if request.is_none() && method != "*" {
        return Err(Error::invalid("there is no such method"));
    }
    match rules {
        Value::Bool(_) => Ok(()),
        Value::List(rules) if method != "*" => rules.iter().try_for_each(|rule| {
            let Value::Object(members) = rule else { return Err(Error::invalid("a rule is no object")) };
            for (name, value) in members {
                match (name.as_str(), value) {
                    ("rule", Value::Text(_)) | ("where", Value::Object(_)) => {}
                    _ => return Err(Error::invalid(format!("unknown or malformed member {name:?} of a rule"))),
                }
            }
            if label(rule).is_empty() {
                return Err(Error::invalid("a rule has no name"));
            }
            conditions(rule).iter().try_for_each(|(path, condition)| {
                check_condition(request.unwrap_or_default(), path, condition)
                    .with_context(|| format!("rule {:?}: {path}", label(rule)))
            })
        }),
        _ => Err(Error::invalid("neither true nor false nor a list of rules")),
    }
}

fn check_condition(message: &str, path: &str, condition: &Value) -> Result<()> {
    let mut message = message;
    let mut steps = path.split('.').peekable();
    while let Some(step) = steps.next() {
        let found = field(message, step).ok_or_else(|| Error::invalid(format!("{message} has no field {step:?}")))?;
        match found.kind {
            Kind::Message(inner) if steps.peek().is_some() => message = inner,
            _ if steps.peek().is_some() => return Err(Error::invalid(format!("{step:?} has no fields"))),
            kind => return check_value(kind, condition),
        }
    }
    Err(Error::invalid("no field is named"))
}

fn check_value(kind: Kind, condition: &Value) -> Result<()> {
    let plain = |value: &Value| {
        matches!(
            (kind, value),
            (Kind::Text, Value::Text(_))
                | (Kind::Bool, Value::Bool(_))
                | (Kind::Signed | Kind::Unsigned, Value::Number(_))
        )
    };
    let good = match condition {
        Value::List(values) => values.iter().all(plain),
        Value::Object(members) => members.iter().all(|(name, value)| match (name.as_str(), value) {
            ("max_count", Value::Number(_)) => true,
            ("min" | "max", Value::Number(_)) => matches!(kind, Kind::Signed | Kind::Unsigned),
            ("exactly", Value::List(values)) => values.iter().all(plain),
            _ => false,
        }),
        value => plain(value),
    };
    if good {
        Ok(())
    } else {
        Err(Error::invalid("a condition that does not fit the field's type"))
    }
}

// ---- judging a request ----

/// Why it is refused.
/// Fields with more elements than this do not fit a condition: to look at them all would take too much memory.
const MAX_FOUND: usize = 1 << 16;

type Verdict = core::result::Result<(), String>;

/// A value at the end of a path.
enum Found<'a> {
    Text(&'a str),
    Bool(bool),
    Number(i64),
    /// A message, or bytes that are no text: only counted.
    Other,
}

fn judge(rule: &Value, method: &str, payload: &[u8]) -> Verdict {
    let request = request_of(method).ok_or("the method is not known")?;
    conditions(rule).iter().try_for_each(|(path, condition)| descend(request, payload, path, condition, path))
}

fn descend(message: &str, bytes: &[u8], path: &str, condition: &Value, whole: &str) -> Verdict {
    let (step, rest) = path.split_once('.').map_or((path, None), |(step, rest)| (step, Some(rest)));
    let field = field(message, step).ok_or("unknown field")?;
    let malformed = || format!("{whole} is ambiguous in the request");
    let mut values = Vec::new();
    codec::fields(bytes, |number, content| {
        if number == field.number && values.len() <= MAX_FOUND {
            values.push(content);
        }
    })
    .map_err(|_| malformed())?;
    let too_many = || format!("{whole} has more than {MAX_FOUND} elements");
    if values.len() > MAX_FOUND {
        return Err(too_many());
    }
    if values.len() > 1 && !field.repeated {
        return Err(malformed());
    }
    if let (Kind::Message(inner), Some(rest)) = (field.kind, rest) {
        // A message that is not there has all its fields at their defaults.
        if values.is_empty() && !field.repeated {
            return descend(inner, &[], rest, condition, whole);
        }
        return values.into_iter().try_for_each(|content| match content {
            Content::Bytes(bytes) => descend(inner, bytes, rest, condition, whole),
            _ => Err(malformed()),
        });
    }
    let mut found = Vec::new();
    for content in values {
        found_in(field, content, &mut found).ok_or_else(malformed)?;
        if found.len() > MAX_FOUND {
            return Err(too_many());
        }
    }
    let countable = matches!(field.kind, Kind::Message(_));
    if found.is_empty() && !field.repeated && !countable {
        found.push(match field.kind {
            Kind::Text | Kind::Bytes => Found::Text(""),
            Kind::Bool => Found::Bool(false),
            _ => Found::Number(0),
        });
    }
    decide(&found, condition, whole, field.repeated)
}

/// Reads one occurrence of a field; `None` when it has not the field's type.
fn found_in<'a>(field: Field, content: Content<'a>, found: &mut Vec<Found<'a>>) -> Option<()> {
    let number = |value: u64| match field.kind {
        Kind::Bool => Found::Bool(value != 0),
        Kind::Signed => Found::Number(value as i64),
        // Larger ones than a policy can name are all alike.
        _ => Found::Number(i64::try_from(value).unwrap_or(i64::MAX)),
    };
    match (field.kind, content) {
        (Kind::Text, Content::Bytes(bytes)) => found.push(Found::Text(core::str::from_utf8(bytes).ok()?)),
        // Paths, mostly; bytes that are no text fit no pattern.
        (Kind::Bytes, Content::Bytes(bytes)) => {
            found.push(core::str::from_utf8(bytes).map_or(Found::Other, Found::Text));
        }
        (Kind::Message(_), Content::Bytes(_)) => found.push(Found::Other),
        (Kind::Bool | Kind::Signed | Kind::Unsigned, Content::Varint(value)) => found.push(number(value)),
        (Kind::Bool | Kind::Signed | Kind::Unsigned, Content::Bytes(packed)) if field.repeated => {
            codec::packed(packed, |value| {
                if found.len() <= MAX_FOUND {
                    found.push(number(value));
                }
            })
            .ok()?;
        }
        _ => return None,
    }
    Some(())
}

fn decide(found: &[Found], condition: &Value, path: &str, repeated: bool) -> Verdict {
    let refused = |at: usize, found: &Found| {
        let index = if repeated { format!("[{at}]") } else { String::new() };
        Err(match found {
            Found::Text(text) => {
                let cut = text.char_indices().nth(MAX_SHOWN).map_or(text.len(), |(end, _)| end);
                format!("{path}{index} is {:?}", &text[..cut])
            }
            Found::Bool(value) => format!("{path}{index} is {value}"),
            Found::Number(value) => format!("{path}{index} is {value}"),
            Found::Other => format!("{path}{index} is there"),
        })
    };
    let each = |good: &dyn Fn(&Found) -> bool| match found.iter().position(|value| !good(value)) {
        Some(at) => refused(at, &found[at]),
        None => Ok(()),
    };
    match condition {
        Value::List(allowed) => each(&|value| allowed.iter().any(|one| fits(value, one))),
        Value::Object(members) => members.iter().try_for_each(|(name, limit)| match (name.as_str(), limit) {
            ("min", Value::Number(limit)) => each(&|value| matches!(value, Found::Number(number) if number >= limit)),
            ("max", Value::Number(limit)) => each(&|value| matches!(value, Found::Number(number) if number <= limit)),
            ("max_count", Value::Number(limit)) if found.len() as i64 > *limit => {
                Err(format!("{path} is there {} times", found.len()))
            }
            ("max_count", _) => Ok(()),
            ("exactly", Value::List(wanted)) if wanted.len() == found.len() => {
                match found.iter().zip(wanted).position(|(value, one)| !fits(value, one)) {
                    Some(at) => refused(at, &found[at]),
                    None => Ok(()),
                }
            }
            _ => Err(format!("{path} is there {} times", found.len())),
        }),
        one => each(&|value| fits(value, one)),
    }
}

fn fits(found: &Found, wanted: &Value) -> bool {
    match (found, wanted) {
        (Found::Text(text), Value::Text(pattern)) => glob(text, pattern),
        (Found::Bool(value), Value::Bool(wanted)) => value == wanted,
        (Found::Number(value), Value::Number(wanted)) => value == wanted,
        _ => false,
    }
}

/// `*` stands for any characters, also none; everything else for itself.
fn glob(text: &str, pattern: &str) -> bool {
    let Some((start, mut rest)) = pattern.split_once('*') else { return text == pattern };
    let Some(mut text) = text.strip_prefix(start) else { return false };
    while let Some((middle, after)) = rest.split_once('*') {
        let Some(at) = text.find(middle) else { return false };
        text = &text[at + middle.len()..];
        rest = after;
    }
    text.ends_with(rest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::errors::code;
    use crate::proto::agent::{CreateContainerRequest, Device, OnlineCPUMemRequest, SignalProcessRequest, Storage};
    use crate::proto::codec::Message;
    use crate::proto::oci::{Process, Root, Spec, User};

    fn policy(allow: &str) -> Policy {
        Policy::parse(&format!("{{\"version\": 1, \"allow\": {allow}}}")).unwrap()
    }

    fn create(id: &str, args: &[&str]) -> CreateContainerRequest {
        let process = Process {
            args: args.iter().map(ToString::to_string).collect(),
            user: Some(Box::new(User { uid: 7, ..Default::default() })),
            ..Default::default()
        };
        let spec = Spec {
            process: Some(Box::new(process)),
            root: Some(Box::new(Root { path: "/r".into(), readonly: true })),
            ..Default::default()
        };
        CreateContainerRequest { container_id: id.into(), oci: Some(Box::new(spec)), ..Default::default() }
    }

    #[test]
    fn only_what_is_listed_is_allowed() {
        let policy = policy("{\"GetMetrics\": true, \"SetPolicy\": false, \"kata.agent.v1.Files/Read\": true}");
        assert_eq!(policy.check(AGENT_SERVICE, "GetMetrics", &[]), Ok(()));
        assert_eq!(policy.check(HEALTH, "Check", &[]), Ok(()));
        assert_eq!(policy.check("kata.agent.v1.Files", "Read", &[]), Ok(()));
        for (service, method) in
            [(AGENT_SERVICE, "SetPolicy"), (AGENT_SERVICE, "CopyFile"), ("kata.agent.v1.Files", "Write"), ("x", "y")]
        {
            let refused = policy.check(service, method, &[]).unwrap_err();
            assert_eq!(refused.code, code::PERMISSION_DENIED, "{method}");
            assert!(refused.message.contains(method) && refused.message.contains("no rule allows it"), "{refused}");
        }
        let open = self::policy("{\"*\": true, \"SetPolicy\": false}");
        assert!(open.check("x", "y", &[]).is_ok() && open.check(AGENT_SERVICE, "SetPolicy", &[]).is_err());
    }

    #[test]
    fn conditions_hold_for_every_value_and_refusals_name_the_rule() {
        let policy = policy(
            "{\"CreateContainer\": [
                {\"rule\": \"web\", \"where\": {\"container_id\": \"web-*\", \"OCI.Process.Args\": {\"exactly\": [\"nginx\", \"-*\"]},
                    \"OCI.Process.User.UID\": {\"min\": 1, \"max\": 9}, \"OCI.Root.Readonly\": true,
                    \"storages.driver\": [\"blk\", \"overlayfs\"], \"devices\": {\"max_count\": 0}, \"OCI.Annotations.key\": \"io.*\"}},
                {\"rule\": \"any-db\", \"where\": {\"container_id\": [\"db\"]}}]}",
        );
        let check =
            |request: &CreateContainerRequest| policy.check(AGENT_SERVICE, "CreateContainer", &request.to_vec());
        let good = create("web-1", &["nginx", "-g"]);
        assert_eq!(check(&good), Ok(()));
        assert_eq!(check(&create("db", &["anything"])), Ok(()));
        let refused = |change: &dyn Fn(&mut CreateContainerRequest), words: &str| {
            let mut request = good.clone();
            change(&mut request);
            let error = check(&request).unwrap_err();
            assert_eq!(error.code, code::PERMISSION_DENIED);
            assert!(error.message.contains(&format!("rule \"web\": {words}")), "{error}");
            assert!(error.message.contains("rule \"any-db\": container_id is "), "{error}");
        };
        refused(&|r| r.container_id = "x".into(), "container_id is \"x\"");
        refused(&|r| *r = create("web-1", &["nginx", "sh"]), "OCI.Process.Args[1] is \"sh\"");
        refused(&|r| *r = create("web-1", &["nginx"]), "OCI.Process.Args is there 1 times");
        refused(&|r| r.devices.push(Device::default()), "devices is there 1 times");
        let storage = |driver: &str| Storage { driver: driver.into(), ..Default::default() };
        refused(&|r| r.storages = vec![storage("blk"), storage("9p")], "storages.driver is \"9p\"");
        refused(&|r| r.storages = vec![storage("")], "storages.driver is \"\"");
        refused(&|r| r.oci.as_mut().unwrap().root = None, "OCI.Root.Readonly is false");
        refused(&|r| r.oci.as_mut().unwrap().process.as_mut().unwrap().user = None, "OCI.Process.User.UID is 0");
        let annotate = |r: &mut CreateContainerRequest| {
            r.oci.as_mut().unwrap().annotations.insert("x.y".into(), "z".into());
        };
        refused(&annotate, "OCI.Annotations.key is \"x.y\"");
    }

    #[test]
    fn what_can_be_understood_in_two_ways_is_refused() {
        let policy = policy("{\"SignalProcess\": [{\"rule\": \"soft\", \"where\": {\"signal\": [15]}}]}");
        let check = |bytes: &[u8]| policy.check(AGENT_SERVICE, "SignalProcess", bytes);
        let request = SignalProcessRequest { signal: 15, ..Default::default() }.to_vec();
        assert_eq!(check(&request), Ok(()));
        // The field once more, of another type, cut off.
        assert!(check(&[&request[..], &[0x18, 9]].concat()).unwrap_err().message.contains("ambiguous"));
        assert!(check(&[0x1a, 1, 15]).is_err() && check(&[0x18]).is_err() && check(&[]).is_err());
    }

    #[test]
    fn numbers_are_compared_as_the_protocol_means_them() {
        let policy = policy(
            "{\"OnlineCPUMem\": [{\"rule\": \"few\", \"where\": {\"nb_cpus\": {\"max\": 4}, \"wait\": false}}]}",
        );
        let check = |nb_cpus| {
            let request = OnlineCPUMemRequest { nb_cpus, ..Default::default() };
            policy.check(AGENT_SERVICE, "OnlineCPUMem", &request.to_vec())
        };
        assert!(check(4).is_ok() && check(0).is_ok() && check(5).is_err() && check(u32::MAX).is_err());
    }

    #[test]
    fn a_policy_is_checked_when_it_is_set() {
        for (bad, words) in [
            ("", "not JSON"),
            ("package agent_policy\n", "not JSON"),
            ("[]", "no object"),
            ("{}", "no member \"allow\""),
            ("{\"allow\": {}, \"deny\": {}}", "\"deny\""),
            ("{\"version\": 2, \"allow\": {}}", "version"),
            ("{\"allow\": {\"Fly\": true}}", "Fly: there is no such method"),
            ("{\"allow\": {\"*\": [{\"rule\": \"x\"}]}}", "neither"),
            ("{\"allow\": {\"CopyFile\": [{}]}}", "no name"),
            ("{\"allow\": {\"CopyFile\": [{\"rule\": \"x\", \"when\": {}}]}}", "\"when\""),
            ("{\"allow\": {\"CopyFile\": [{\"rule\": \"x\", \"where\": {\"pth\": \"a\"}}]}}", "no field \"pth\""),
            ("{\"allow\": {\"CopyFile\": [{\"rule\": \"x\", \"where\": {\"path.x\": \"a\"}}]}}", "has no fields"),
            ("{\"allow\": {\"CopyFile\": [{\"rule\": \"x\", \"where\": {\"path\": 1}}]}}", "does not fit"),
            ("{\"allow\": {\"CopyFile\": [{\"rule\": \"x\", \"where\": {\"path\": {\"min\": 1}}}]}}", "does not fit"),
        ] {
            let error = Policy::parse(bad).err().unwrap();
            assert!(error.code == code::INVALID_ARGUMENT && error.message.contains(words), "{bad}: {error}");
        }
    }

    #[test]
    fn patterns() {
        for (text, pattern, fits) in [
            ("abc", "abc", true),
            ("abc", "a*", true),
            ("abc", "*c", true),
            ("abc", "a*b*c", true),
            ("abc", "*", true),
            ("", "*", true),
            ("abc", "ab", false),
            ("aba", "ab*ba", false),
            ("axbxc", "a*x*c", true),
            ("abc", "*d*", false),
        ] {
            assert_eq!(glob(text, pattern), fits, "{text} {pattern}");
        }
    }
}
