//! Files that belong into a report beside the runs: tables of `eval`, of `fidelity`, pictures of `predict`.

use std::fmt::Write;
use std::path::Path;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;

use super::confusion::Confusion;
use crate::study::page::escaped;
use crate::sys::files::read;
use crate::{Error, Result};

/// Bytes of a picture, at most: a page is to be mailed.
const LARGEST: usize = 512 << 10;

/// One file.
#[derive(Clone, Debug)]
pub struct Beside {
    name: String,
    kind: Kind,
}

#[derive(Clone, Debug)]
enum Kind {
    Confusion(Confusion),
    Fidelity(Vec<Fidelity>),
    Picture(Vec<u8>),
}

/// A row of `sideways fidelity --json`.
#[derive(Clone, Debug, Deserialize)]
struct Fidelity {
    rule: String,
    stride: usize,
    module: usize,
    cosine: Spread,
    norm_ratio: Spread,
    relative_error: Spread,
}

#[derive(Clone, Copy, Debug, Deserialize)]
struct Spread {
    mean: f64,
    deviation: f64,
}

impl Beside {
    /// Reads a file, whose content tells what it is.
    ///
    /// # Errors
    /// [`Error::Input`] for a file that cannot be read, or is none of these.
    pub fn read(path: &Path) -> Result<Self> {
        let refused = |why: String| Error::input(format!("{}: {why}", path.display()));
        let bytes = read(path).map_err(|e| refused(e.to_string()))?;
        let kind = if bytes.starts_with(b"\x89PNG\r\n\x1a\n") {
            if bytes.len() > LARGEST {
                return Err(refused(format!("a picture of {} bytes: a report takes up to {LARGEST}", bytes.len())));
            }
            Kind::Picture(bytes)
        } else if let Some(rows) = fidelity(&bytes) {
            Kind::Fidelity(rows)
        } else {
            let none = "no table of eval (--scores FILE.csv, --confusion), of fidelity (--json), and no PNG";
            let text = std::str::from_utf8(&bytes).map_err(|_| refused(none.into()))?;
            if !text.starts_with("label") && !text.starts_with("video") {
                return Err(refused(none.into()));
            }
            Kind::Confusion(Confusion::parse(&bytes).map_err(refused)?)
        };
        Ok(Beside { name: path.file_name().unwrap_or_default().to_string_lossy().into_owned(), kind })
    }

    /// As HTML.
    ///
    /// # Errors
    /// [`Error::Run`] if a picture cannot be made.
    pub fn html(&self) -> Result<String> {
        let name = escaped(&self.name);
        Ok(match &self.kind {
            Kind::Confusion(confusion) => format!("<h2>Classes: {name}</h2>\n{}", confusion.html()?),
            Kind::Fidelity(rows) => format!("<h2>Fidelity of gradients: {name}</h2>\n{}", table(rows)),
            Kind::Picture(png) => format!(
                "<h2>{name}</h2>\n<figure><img alt=\"{name}\" style=\"max-width:100%\" src=\"data:image/png;base64,{}\"></figure>\n",
                BASE64_STANDARD.encode(png)
            ),
        })
    }
}

/// The rows in a file of JSON, one after the other or within other values; `None` where there are none.
fn fidelity(bytes: &[u8]) -> Option<Vec<Fidelity>> {
    let values: std::result::Result<Vec<serde_json::Value>, _> =
        serde_json::Deserializer::from_slice(bytes).into_iter().collect();
    let mut rows = Vec::new();
    let mut rest = values.ok()?;
    rest.reverse();
    while let Some(value) = rest.pop() {
        match value {
            serde_json::Value::Object(ref fields) if fields.contains_key("cosine") => {
                rows.push(serde_json::from_value(value).ok()?);
            }
            serde_json::Value::Object(fields) => rest.extend(fields.into_iter().map(|(_, value)| value)),
            serde_json::Value::Array(items) => rest.extend(items.into_iter().rev()),
            _ => {}
        }
    }
    (!rows.is_empty()).then_some(rows)
}

/// A row a module and stride, with the cosine as a bar.
fn table(rows: &[Fidelity]) -> String {
    let mut table = String::from(
        "<p>Each module's gradient g by a rule beside e by exact back-propagation at the same parameters, means over a clip; \u{b1} is the \
         standard deviation of a batch.</p>\n<div class=\"wide\"><table><tr><th>rule</th><th>stride</th><th>module</th><th>cosine of g and \
         e</th><th></th><th>|g| / |e|</th><th>|g \u{2212} e| / |e|</th></tr>\n",
    );
    let shown = |spread: Spread| format!("{:.4} \u{b1} {:.4}", spread.mean, spread.deviation);
    for row in rows {
        let _ = writeln!(
            table,
            "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td><div class=\"bar\" style=\"min-width:120px\"><i style=\"width:{:.1}%;\
             background:#1f77b4\"></i></div></td><td>{}</td><td>{}</td></tr>",
            escaped(&row.rule),
            row.stride,
            row.module,
            shown(row.cosine),
            100.0 * row.cosine.mean.clamp(0.0, 1.0),
            shown(row.norm_ratio),
            shown(row.relative_error)
        );
    }
    table + "</table></div>\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_tells_what_a_file_is() {
        let dir = tempfile::tempdir().unwrap();
        let of = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            Beside::read(&path)?.html()
        };
        let spread = r#"{"mean":0.5,"deviation":0.25}"#;
        let row = |module: u32| {
            format!(
                r#"{{"rule":"stash","stride":2,"module":{module},"batches":3,"cosine":{spread},"norm_ratio":{spread},"relative_error":{spread}}}"#
            )
        };
        for text in [format!("{}\n{}\n", row(1), row(2)), format!("{{\"rows\":[{},{}]}}", row(1), row(2))] {
            let html = of("fidelity.json", text.as_bytes()).unwrap();
            assert_eq!(html.matches("<td>0.5000 \u{b1} 0.2500</td>").count(), 6, "{html}");
            assert!(html.find("<td>1</td>") < html.find("<td>2</td><td>0.5"), "in their order: {html}");
        }
        assert!(of("c.csv", b"label,a\na,1\n").unwrap().contains("Classes: c.csv"));
        assert!(of("p.png", b"\x89PNG\r\n\x1a\n...").unwrap().contains("src=\"data:image/png;base64,iVBORw0KGgou"));
        for (name, bytes, says) in [
            ("x.json", &b"{\"a\": 1}"[..], "no table of eval"),
            ("x.csv", b"label,a\na,-1\n", "\"-1\" is no number"),
            ("x.bin", b"\xff\xfe", "no table of eval"),
        ] {
            let error = of(name, bytes).unwrap_err();
            assert!(error.exit_code() == 2 && error.to_string().contains(says), "{error}");
        }
    }
}
