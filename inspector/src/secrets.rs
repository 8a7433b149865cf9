//! Text that looks like a key. What is found is never passed on whole.

/// A finding: which rule, in which line, and a redacted beginning.
#[derive(Debug, PartialEq)]
pub struct Secret {
    pub rule: &'static str,
    pub line: usize,
    pub shown: String,
}

struct Rule {
    name: &'static str,
    prefix: &'static [u8],
    /// Which characters follow.
    allowed: fn(u8) -> bool,
    least: usize,
    most: usize,
}

fn word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-'
}

fn upper(byte: u8) -> bool {
    byte.is_ascii_uppercase() || byte.is_ascii_digit()
}

fn alphanumeric(byte: u8) -> bool {
    byte.is_ascii_alphanumeric()
}

fn dotted(byte: u8) -> bool {
    word(byte) || byte == b'.'
}

const fn rule(name: &'static str, prefix: &'static [u8], allowed: fn(u8) -> bool, least: usize, most: usize) -> Rule {
    Rule { name, prefix, allowed, least, most }
}

const RULES: &[Rule] = &[
    rule("aws-access-key", b"AKIA", upper, 16, 16),
    rule("aws-access-key", b"ASIA", upper, 16, 16),
    rule("github-token", b"ghp_", alphanumeric, 36, 255),
    rule("github-token", b"gho_", alphanumeric, 36, 255),
    rule("github-token", b"ghs_", alphanumeric, 36, 255),
    rule("github-token", b"ghu_", alphanumeric, 36, 255),
    rule("github-token", b"github_pat_", word, 60, 255),
    rule("gitlab-token", b"glpat-", word, 20, 64),
    rule("slack-token", b"xoxb-", word, 20, 255),
    rule("slack-token", b"xoxp-", word, 20, 255),
    rule("slack-token", b"xapp-", word, 20, 255),
    rule("google-api-key", b"AIza", word, 35, 35),
    rule("stripe-key", b"sk_live_", alphanumeric, 16, 255),
    rule("stripe-key", b"rk_live_", alphanumeric, 16, 255),
    rule("npm-token", b"npm_", alphanumeric, 36, 36),
    rule("pypi-token", b"pypi-AgE", word, 40, 1000),
    rule("sendgrid-key", b"SG.", dotted, 60, 70),
    rule("openai-key", b"sk-proj-", word, 40, 255),
    rule("anthropic-key", b"sk-ant-", word, 40, 255),
    rule("digitalocean-token", b"dop_v1_", alphanumeric, 64, 64),
    rule("web-token", b"eyJhbGciOi", dotted, 60, 4000),
];

const LABELS: &[&[u8]] = &[
    b"password",
    b"passwd",
    b"secret",
    b"token",
    b"api_key",
    b"apikey",
    b"api-key",
    b"access_key",
    b"private_key",
    b"_authtoken",
    b"secret_key",
    b"auth",
];

const PEM: &[u8] = b"-----BEGIN ";

/// What a text holds, at most `most` of it. `is_setting` says that the file is of the kind that has passwords in it.
pub fn scan(data: &[u8], is_setting: bool, most: usize) -> Vec<Secret> {
    let mut found = Vec::new();
    let mut starts = [false; 256];
    for rule in RULES {
        starts[usize::from(rule.prefix[0])] = true;
    }
    starts[usize::from(b'-')] = true;
    let mut at = 0;
    while let Some(step) = data[at..].iter().position(|byte| starts[usize::from(*byte)]) {
        at += step;
        if data[at] == b'-' && data[at..].starts_with(PEM) {
            if let Some(name) = private_key(&data[at..]) {
                found.push(Secret { rule: name, line: line_of(data, at), shown: String::new() });
            }
            at += PEM.len();
        } else if at == 0 || !word(data[at - 1]) {
            for rule in RULES.iter().filter(|rule| data[at..].starts_with(rule.prefix)) {
                let from = at + rule.prefix.len();
                let length = data[from..].iter().take(rule.most + 1).take_while(|byte| (rule.allowed)(**byte)).count();
                let body = &data[from..from + length];
                if length >= rule.least && length <= rule.most && entropy(body) > 2.8 {
                    let whole = &data[at..from + length];
                    found.push(Secret { rule: rule.name, line: line_of(data, at), shown: redacted(whole) });
                    at = from + length - 1;
                    break;
                }
            }
            at += 1;
        } else {
            at += 1;
        }
        if found.len() >= most {
            return found;
        }
        if at >= data.len() {
            break;
        }
    }
    if is_setting {
        assignments(data, &mut found, most);
    }
    found
}

/// The name of a PEM block that is a private key and has a body.
fn private_key(data: &[u8]) -> Option<&'static str> {
    let end = data.iter().take(80).position(|byte| *byte == b'\n' || *byte == b'\\')?;
    let head = &data[..end];
    if !head.windows(11).any(|part| part == b"PRIVATE KEY") {
        return None;
    }
    let body = &data[end..data.len().min(end + 400)];
    let digits = body.iter().filter(|b| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'/')).count();
    (digits >= 100 || (digits >= 40 && body.windows(8).any(|part| part == b"-----END"))).then_some("private-key")
}

fn line_of(data: &[u8], at: usize) -> usize {
    1 + data[..at].iter().filter(|byte| **byte == b'\n').count()
}

/// Shannon's entropy in bits for each byte.
pub fn entropy(data: &[u8]) -> f64 {
    let mut counts = [0_u32; 256];
    for byte in data {
        counts[usize::from(*byte)] += 1;
    }
    let total = data.len() as f64;
    counts.iter().filter(|count| **count > 0).map(|count| f64::from(*count) / total).map(|p| -p * p.log2()).sum()
}

/// The first four characters, and how many there are.
pub fn redacted(data: &[u8]) -> String {
    let shown: String = data.iter().take(4).map(|byte| char::from(*byte)).collect();
    format!("{shown}... ({} characters)", data.len())
}

/// `password = "..."` and the like, where the value looks random.
fn assignments(data: &[u8], found: &mut Vec<Secret>, most: usize) {
    for (number, line) in data.split(|byte| *byte == b'\n').enumerate() {
        if line.len() > 2000 || found.len() >= most {
            continue;
        }
        let Some(place) = line.iter().position(|byte| matches!(byte, b'=' | b':')) else { continue };
        let key = line[..place].to_ascii_lowercase();
        if !LABELS.iter().any(|label| {
            key.ends_with(label) || key.trim_ascii_end().ends_with(label) || {
                let bare: Vec<u8> = key.iter().copied().filter(|b| !matches!(b, b'"' | b'\'' | b' ')).collect();
                bare.ends_with(label)
            }
        }) {
            continue;
        }
        let value = line[place + 1..].trim_ascii();
        let value: &[u8] = match value.first() {
            Some(quote @ (b'"' | b'\'')) => value[1..].split(|byte| byte == quote).next().unwrap_or_default(),
            _ => value.split(u8::is_ascii_whitespace).next().unwrap_or_default(),
        };
        let value = value.strip_suffix(b",").unwrap_or(value);
        if is_random(value) && !found.iter().any(|one| one.line == number + 1) {
            found.push(Secret { rule: "password-in-text", line: number + 1, shown: redacted(value) });
        }
    }
}

/// Whether a value looks like a secret: long, mixed, and no name, path or place-holder.
pub fn is_random(value: &[u8]) -> bool {
    (10..=512).contains(&value.len())
        && value.iter().all(|byte| byte.is_ascii_graphic())
        && !value.iter().any(|byte| matches!(byte, b'$' | b'{' | b'<' | b'(' | b'%' | b'`' | b'['))
        && !value.starts_with(b"/")
        && value.iter().any(u8::is_ascii_digit)
        && value.iter().any(u8::is_ascii_alphabetic)
        && entropy(value) >= 3.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_found_and_redacted() {
        let text = b"x = 1\nkey=AKIAIOSFODNN7EXAMPLQ\n";
        let found = scan(text, false, 10);
        assert_eq!(found[0], Secret { rule: "aws-access-key", line: 2, shown: "AKIA... (20 characters)".into() });
        let pem = format!("-----BEGIN RSA PRIVATE KEY-----\n{}\n", "Ab1+".repeat(50));
        assert_eq!(scan(pem.as_bytes(), false, 10)[0].rule, "private-key");
        let settings = b"DB_PASSWORD=hunter2hunter2xyz\n\"token\": \"a8f5f167f44f4964e6c998dee827110c\",\n";
        let rules: Vec<_> = scan(settings, true, 10).iter().map(|one| (one.rule, one.line)).collect();
        assert_eq!(rules, [("password-in-text", 1), ("password-in-text", 2)]);
    }

    #[test]
    fn what_only_looks_like_one_is_not() {
        for text in [
            &b"-----BEGIN PRIVATE KEY-----"[..],
            b"if line.startswith('-----BEGIN RSA PRIVATE KEY-----'):\n  pass",
            b"-----BEGIN CERTIFICATE-----\nAAAA",
            b"password = ${PASSWORD}\npassword: changeme\ntoken = /run/secrets/token1\n",
            b"xAKIAIOSFODNN7EXAMPLQ AKIAAAAAAAAAAAAAAAAA AKIA",
        ] {
            assert_eq!(scan(text, true, 10), [], "{}", String::from_utf8_lossy(text));
        }
    }
}
