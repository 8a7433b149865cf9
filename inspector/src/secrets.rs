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

fn path(byte: u8) -> bool {
    word(byte) || byte == b'/'
}

fn base64(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/' | b'=')
}

fn equals(byte: u8) -> bool {
    word(byte) || byte == b'='
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
    rule("github-token", b"ghr_", alphanumeric, 36, 255),
    rule("slack-token", b"xoxa-", word, 20, 255),
    rule("slack-token", b"xoxr-", word, 20, 255),
    rule("slack-token", b"xoxs-", word, 20, 255),
    rule("slack-webhook", b"https://hooks.slack.com/services/", path, 40, 100),
    rule("stripe-key", b"sk_test_", alphanumeric, 16, 255),
    rule("huggingface-token", b"hf_", alphanumeric, 34, 40),
    rule("docker-token", b"dckr_pat_", word, 24, 40),
    rule("vault-token", b"hvs.", word, 80, 200),
    rule("atlassian-token", b"ATATT3", equals, 60, 255),
    rule("shopify-token", b"shpat_", alphanumeric, 32, 32),
    rule("age-key", b"AGE-SECRET-KEY-1", upper, 50, 70),
    rule("azure-key", b"AccountKey=", base64, 80, 100),
    rule("web-token", b"eyJ0eXAiOi", dotted, 60, 4000),
];

const LABELS: &[&[u8]] = &[
    b"password",
    b"passwd",
    b"passphrase",
    b"secret",
    b"token",
    b"api_key",
    b"apikey",
    b"api-key",
    b"access_key",
    b"accesskey",
    b"private_key",
    b"_authtoken",
    b"secret_key",
    b"secretkey",
    b"client-key-data",
    b"_auth",
    b"\"auth",
];

const PEM: &[u8] = b"-----BEGIN ";
const PUTTY: &[u8] = b"PuTTY-User-Key-File-";
const OVERLAP: usize = 4096;
/// Lines that are longer than this are read to here.
const MAX_LINE: usize = 64 << 10;

/// Where two bytes of what is looked for are that other texts rarely have: a table over all pairs, whose entries are 0 or
/// one more than a place in a list of (prefix, how far behind its beginning the pair is).
struct Pairs {
    table: Box<[u8; 65536]>,
    places: Vec<Vec<(&'static [u8], usize)>>,
}

/// How common two bytes are next to one another, roughly.
fn commonness(pair: &[u8]) -> u32 {
    pair.iter().map(|byte| if byte.is_ascii_lowercase() || *byte == b'-' { 2 } else { 1 }).sum()
}

/// Of three bytes in a row, two begin at an even place: so it is enough to look at every second pair.
fn pairs() -> &'static Pairs {
    static PAIRS: std::sync::OnceLock<Pairs> = std::sync::OnceLock::new();
    PAIRS.get_or_init(|| {
        let mut made =
            Pairs { table: vec![0; 65536].try_into().unwrap_or_else(|_| Box::new([0; 65536])), places: vec![] };
        for prefix in RULES.iter().map(|rule| rule.prefix).chain([PEM, PUTTY, b"://"]) {
            let rarest = (0..prefix.len() - 2)
                .min_by_key(|at| commonness(&prefix[*at..at + 2]) + commonness(&prefix[at + 1..at + 3]));
            let from = rarest.unwrap_or(0);
            for at in [from, from + 1] {
                let entry = &mut made.table[usize::from(prefix[at + 1]) << 8 | usize::from(prefix[at])];
                if *entry == 0 {
                    made.places.push(Vec::new());
                    *entry = made.places.len() as u8;
                }
                made.places[usize::from(*entry) - 1].push((prefix, at));
            }
        }
        made
    })
}

/// Where anything begins that a rule is about, in order.
fn beginnings(data: &[u8]) -> Vec<usize> {
    let pairs = pairs();
    let mut found: Vec<usize> = Vec::new();
    let mut look = |at: usize, entry: u8| {
        for (prefix, behind) in &pairs.places[usize::from(entry) - 1] {
            if at.checked_sub(*behind).is_some_and(|start| data[start..].starts_with(prefix)) {
                found.push(at - behind);
            }
        }
    };
    let of = |pair: u64| pairs.table[(pair & 0xffff) as usize];
    let mut words = data.chunks_exact(8);
    let mut at = 0;
    for word in &mut words {
        let word = u64::from_le_bytes(word.try_into().unwrap_or_default());
        if of(word) | of(word >> 16) | of(word >> 32) | of(word >> 48) != 0 {
            for step in 0..4 {
                let entry = of(word >> (16 * step));
                if entry != 0 {
                    look(at + 2 * step, entry);
                }
            }
        }
        at += 8;
    }
    for pair in words.remainder().chunks_exact(2) {
        let entry = of(u64::from(u16::from_le_bytes([pair[0], pair[1]])));
        if entry != 0 {
            look(at, entry);
        }
        at += 2;
    }
    found.sort_unstable();
    found
}

/// Looks through a file that comes in pieces.
pub struct Search {
    is_setting: bool,
    is_wide: bool,
    most: usize,
    lines: usize,
    carried: Vec<u8>,
    /// Leave keys in PEM out: libraries of cryptography hold some that they try themselves with.
    pub is_library: bool,
    pub found: Vec<Secret>,
}

impl Search {
    /// `head` is the beginning of the file, which has to be fed, too.
    pub fn new(head: &[u8], is_setting: bool, most: usize) -> Search {
        let is_wide = head.starts_with(&[0xff, 0xfe]) || head.starts_with(&[0xfe, 0xff]);
        Search {
            is_setting: is_setting || is_wide,
            is_wide,
            most,
            lines: 0,
            carried: Vec::new(),
            is_library: false,
            found: Vec::new(),
        }
    }

    /// Look at the next bytes. `is_last` says that none follow.
    pub fn feed(&mut self, piece: &[u8], is_last: bool) {
        if self.found.len() >= self.most {
            return;
        }
        let mut joined = std::mem::take(&mut self.carried);
        let window = if self.is_wide {
            // UTF-16: what matters here is in its lower half.
            joined.extend(piece.iter().filter(|byte| **byte != 0));
            &joined[..]
        } else if joined.is_empty() {
            piece
        } else {
            joined.extend(piece);
            &joined[..]
        };
        for mut one in scan(window, self.is_setting, self.most) {
            if self.is_library && one.rule == "private-key" {
                continue;
            }
            one.line += self.lines;
            let is_known = self.found.iter().any(|other| (other.rule, other.line) == (one.rule, one.line));
            if !is_known && self.found.len() < self.most {
                self.found.push(one);
            }
        }
        if is_last {
            return;
        }
        let cut = window.len().saturating_sub(OVERLAP);
        self.lines += window[..cut].iter().filter(|byte| **byte == b'\n').count();
        self.carried = window[cut..].to_vec();
    }
}

/// What a text holds, at most `most` of it. `is_setting` says that the file is of the kind that has passwords in it.
pub fn scan(data: &[u8], is_setting: bool, most: usize) -> Vec<Secret> {
    spans(data, is_setting, most).into_iter().map(|(_, secret)| secret).collect()
}

/// A text with what looks like a key replaced.
pub fn masked(text: &str, is_setting: bool) -> String {
    let mut out = text.as_bytes().to_vec();
    let mut all = spans(text.as_bytes(), is_setting, 1000);
    all.sort_by_key(|(span, _)| std::cmp::Reverse(span.start));
    let mut end = out.len();
    for (span, secret) in all {
        if span.end <= end {
            end = span.start;
            let shown = if secret.shown.is_empty() { format!("({})", secret.rule) } else { secret.shown };
            out.splice(span, shown.into_bytes());
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// The same with the place of each.
pub fn spans(data: &[u8], is_setting: bool, most: usize) -> Vec<(std::ops::Range<usize>, Secret)> {
    let mut found: Vec<(std::ops::Range<usize>, Secret)> = Vec::new();
    let mut next = 0;
    for at in beginnings(data) {
        if at < next {
            continue;
        }
        if found.len() >= most {
            return found;
        }
        let rest = &data[at..];
        let mut add = |range: std::ops::Range<usize>, rule, shown| {
            found.push((range, Secret { rule, line: line_of(data, at), shown }));
        };
        if rest.starts_with(PEM) {
            if let Some((name, length)) = private_key(rest) {
                add(at..at + length, name, String::new());
                next = at + length;
            }
        } else if rest.starts_with(PUTTY) {
            if rest[..rest.len().min(4000)].windows(14).any(|part| part == b"Private-Lines:") {
                add(at..at + PUTTY.len(), "private-key", String::new());
            }
        } else if rest.starts_with(b"://") {
            if let Some(value) = in_address(rest) {
                let shown = redacted(&rest[value.clone()]);
                add(at + value.start..at + value.end, "password-in-address", shown);
                next = at + value.end;
            }
        } else if at == 0 || !word(data[at - 1]) || !alphanumeric(data[at]) {
            for rule in RULES.iter().filter(|rule| rest.starts_with(rule.prefix)) {
                let from = rule.prefix.len();
                let length = rest[from..].iter().take(rule.most + 1).take_while(|byte| (rule.allowed)(**byte)).count();
                if length >= rule.least && length <= rule.most && entropy(&rest[from..from + length]) > 2.8 {
                    add(at..at + from + length, rule.name, redacted(&rest[..from + length]));
                    next = at + from + length;
                    break;
                }
            }
        }
    }
    if is_setting {
        assignments(data, &mut found, most);
    }
    found
}

/// The password in what follows the scheme of an address: `://user:password@host`.
fn in_address(rest: &[u8]) -> Option<std::ops::Range<usize>> {
    let authority = rest[3..].iter().take(300).take_while(|byte| byte.is_ascii_graphic() && !b"/\"'<>`".contains(byte));
    let length = authority.count();
    let text = &rest[3..3 + length];
    let at = text.iter().rposition(|byte| *byte == b'@')?;
    let colon = text[..at].iter().position(|byte| *byte == b':')?;
    let value = &text[colon + 1..at];
    let is_place_holder = value.iter().any(|byte| b"${}%*[]()".contains(byte))
        || [&b"password"[..], b"passwd", b"pass", b"secret", b"pwd"]
            .iter()
            .any(|word| value.eq_ignore_ascii_case(word));
    (colon > 0 && value.len() >= 6 && at + 1 < text.len() && !is_place_holder && value.iter().any(u8::is_ascii_digit))
        .then_some(3 + colon + 1..3 + at)
}

/// The name and the length of a PEM block that is a private key and has a body.
fn private_key(data: &[u8]) -> Option<(&'static str, usize)> {
    let end = data.iter().take(80).position(|byte| *byte == b'\n' || *byte == b'\\')?;
    let head = &data[..end];
    if !head.windows(11).any(|part| part == b"PRIVATE KEY") {
        return None;
    }
    let reach = &data[end..data.len().min(end + 8192)];
    let last = reach.windows(8).position(|part| part == b"-----END").unwrap_or(reach.len());
    let body = &reach[..last];
    let digits = body.iter().take(400).filter(|b| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'/')).count();
    let is_closed = last < reach.len();
    (digits >= 100 || (digits >= 40 && is_closed)).then_some(("private-key", end + last))
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
fn assignments(data: &[u8], found: &mut Vec<(std::ops::Range<usize>, Secret)>, most: usize) {
    let mut start = 0;
    for (number, whole) in data.split(|byte| *byte == b'\n').enumerate() {
        let from = start;
        start += whole.len() + 1;
        let line = &whole[..whole.len().min(MAX_LINE)];
        let mut last = 0;
        for place in line.iter().enumerate().filter(|(_, byte)| matches!(byte, b'=' | b':' | b' ' | b',' | b'>')) {
            let place = place.0;
            if found.len() >= most {
                return;
            }
            if place < last || !is_label(&line[..place], line[place]) {
                continue;
            }
            let Some(value) = value_at(line, place + 1) else { continue };
            let range = from + value.start..from + value.end;
            if is_random(&line[value.clone()]) && !found.iter().any(|(other, _)| other.contains(&range.start)) {
                last = value.end;
                let shown = redacted(&line[value]);
                found.push((range, Secret { rule: "password-in-text", line: number + 1, shown }));
            }
        }
    }
}

/// Whether what stands before a separator names a secret.
fn is_label(before: &[u8], separator: u8) -> bool {
    let before = &before[before.len().saturating_sub(80)..];
    let mut bare: Vec<u8> = before.to_ascii_lowercase();
    while matches!(bare.last(), Some(b' ' | b'\t' | b'"' | b'\'')) && separator != b' ' {
        bare.pop();
    }
    match separator {
        // .netrc, and commands: `password VALUE`, `--password VALUE`
        b' ' => [&b"password"[..], b"--token", b"--secret"].iter().any(|label| bare.ends_with(label)),
        // PHP: define('DB_PASSWORD', 'VALUE')
        b',' => before.ends_with(b"'") && LABELS.iter().any(|label| bare.ends_with(label)),
        // XML: <password>VALUE<; PHP: 'password' => 'VALUE'
        b'>' => {
            let bare = bare.strip_suffix(b"=").unwrap_or(&bare).trim_ascii_end();
            let bare = bare.strip_suffix(b"'").or_else(|| bare.strip_suffix(b"\"")).unwrap_or(bare);
            LABELS.iter().any(|label| bare.ends_with(label))
        }
        _ => LABELS.iter().any(|label| bare.ends_with(label)),
    }
}

/// A value with more bytes than these is no secret.
const LONGEST: usize = 512;

/// The word or quoted text that begins at `from`, after spaces.
fn value_at(line: &[u8], from: usize) -> Option<std::ops::Range<usize>> {
    let from = from + line[from..].iter().position(|byte| !matches!(byte, b' ' | b'\t'))?;
    let (from, ends): (usize, &[u8]) = match line[from] {
        b'"' => (from + 1, b"\""),
        b'\'' => (from + 1, b"'"),
        _ => (from, b" \t\r,;<&\"'})"),
    };
    // What is longer than a secret is none, wherever it ends.
    let most = line.len().min(from + LONGEST + 1);
    let end = line[from..most].iter().position(|byte| ends.contains(byte)).map_or(most, |length| from + length);
    Some(from..end)
}

/// Whether a value looks like a secret: long, mixed, and no name, path or place-holder.
pub fn is_random(value: &[u8]) -> bool {
    (10..=LONGEST).contains(&value.len())
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
    fn in_every_way_that_people_write_them() {
        for text in [
            "//registry.example.org/:_authToken=0a1b2c3d-4e5f-6071-8293\n",
            "{\"user\":\"me\",\"password\":\"q7Wx9Zt2Lm4\",\"x\":1}",
            "machine example.org login me password q7Wx9Zt2Lm4\n",
            "define('DB_PASSWORD', 'q7Wx9Zt2Lm4');",
            "<password>q7Wx9Zt2Lm4</password>",
            "curl --token q7Wx9Zt2Lm4 x",
            "  'password' => 'q7Wx9Zt2Lm4',",
            "url: postgres://me:q7Wx9Zt2@db.example.org/x",
        ] {
            assert_eq!(scan(text.as_bytes(), true, 10).len(), 1, "{text}");
            let masked = masked(text, true);
            assert!(!masked.contains("9Zt2") && !masked.contains("6071"), "{masked}");
        }
    }

    #[test]
    fn a_file_in_pieces_is_one_file() {
        let mut text = "line\n".repeat(3000).into_bytes();
        text.extend(b"key AKIAIOSFODNN7EXAMPLQ\n");
        text.extend("line\n".repeat(3000).into_bytes());
        for size in [100, 4095, 5000, 15_010, 40_000] {
            let mut search = Search::new(&text, false, 5);
            for piece in text.chunks(size) {
                search.feed(piece, false);
            }
            let lines: Vec<usize> = search.found.iter().map(|one| one.line).collect();
            assert_eq!(lines, [3001], "{size}");
        }
        let wide: Vec<u8> =
            [0xff, 0xfe].into_iter().chain("password=q7Wx9Zt2Lm4".bytes().flat_map(|b| [b, 0])).collect();
        let mut search = Search::new(&wide, false, 5);
        search.feed(&wide, true);
        assert_eq!(search.found.len(), 1);
    }

    #[test]
    fn values_are_not_followed_further_than_secrets_reach() {
        let long = [b"password=".as_slice(), &b"a1".repeat(50_000)].concat();
        assert_eq!(value_at(&long, 9), Some(9..9 + LONGEST + 1));
        assert_eq!(scan(&long, true, 10), []);
        let fits = [b"password=".as_slice(), &b"Ab1c2d3e".repeat(LONGEST / 8)].concat();
        assert_eq!(scan(&fits, true, 10)[0].shown, "Ab1c... (512 characters)");
    }

    #[test]
    fn whatever_is_looked_for_begins_anywhere() {
        for prefix in RULES.iter().map(|rule| rule.prefix).chain([PEM, PUTTY, b"://"]) {
            for before in 0..9 {
                for after in 0..9 {
                    let text = [&[b'.'].repeat(before), prefix, &[b'.'].repeat(after)].concat();
                    assert!(beginnings(&text).contains(&before), "{before} {}", String::from_utf8_lossy(&text));
                }
            }
        }
    }

    #[test]
    fn what_only_looks_like_one_is_not() {
        for text in [
            &b"-----BEGIN PRIVATE KEY-----"[..],
            b"if line.startswith('-----BEGIN RSA PRIVATE KEY-----'):\n  pass",
            b"-----BEGIN CERTIFICATE-----\nAAAA",
            b"password = ${PASSWORD}\npassword: changeme\ntoken = /run/secrets/token1\n",
            b"xAKIAIOSFODNN7EXAMPLQ AKIAAAAAAAAAAAAAAAAA AKIA",
            b"see http://user:password@example.org and https://example.org:8080/a@b2 and proto://u:${PASS123}@h",
            b"token: abcdefghijklmnop, secret => nothing, a password and nothing123else",
        ] {
            assert_eq!(scan(text, true, 10), [], "{}", String::from_utf8_lossy(text));
        }
    }
}
