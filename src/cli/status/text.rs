//! Describes the status of a mount for people.

use indicatif::BinaryBytes;
use serde_json::Value;

/// Describes a status in some lines.
pub(super) fn describe(status: &Value) -> String {
    let word = |value: &Value| value.as_str().unwrap_or("?").to_owned();
    let mut text = format!("{}\n", word(&status["mountpoint"]));
    let mut line = |name: &str, value: String| text += &format!("  {name:<10} {value}\n");
    let boxes = match status["boxes"].as_u64() {
        Some(1) => "1 box".to_owned(),
        Some(count) => format!("{count} boxes"),
        None => "its rows can't be read".to_owned(),
    };
    line("home", format!("{}, {boxes}", word(&status["home"])));
    if let Some(why) = status["changes"].as_str() {
        line("read only", why.to_owned());
    }
    if let Some(runtime) = status["runtime"].as_str() {
        let what = match status["options"]["exclusive"].as_bool() {
            Some(true) => "every change is",
            _ => "renaming boxes, editing box.json, merging and repairing are",
        };
        line(
            "BoxLite",
            format!("open in {runtime}; until it ends, {what} EBUSY"),
        );
    }
    line("options", options(&status["options"]));
    let (version, pid) = (word(&status["version"]), &status["pid"]);
    line(
        "serves",
        format!(
            "boxlitefs {version}, process {pid}, since {}",
            word(&status["since"])
        ),
    );
    let operations = status["operations"].as_array();
    for operation in operations.into_iter().flatten() {
        line("running", operation_line(operation));
    }
    if operations.is_none_or(Vec::is_empty) {
        line("running", "nothing".to_owned());
    }
    let cache = &status["cache"];
    line(
        "cache",
        format!(
            "{} of {} in {} compressed archives, {} of sizes and checksums",
            bytes(&cache["bytes"]),
            bytes(&cache["limit_bytes"]),
            cache["archives"],
            bytes(&cache["remembered_bytes"])
        ),
    );
    let undo = &status["undo"];
    line(
        "undo",
        match undo["entries"].as_u64() {
            None | Some(0) => "nothing can be had back".to_owned(),
            Some(entries) => {
                let space = undo["bytes"].as_u64().map_or_else(String::new, |space| {
                    format!(", which take {}", BinaryBytes(space))
                });
                format!("{entries} states can be had back{space}")
            }
        },
    );
    let memory = &status["memory"];
    let (resident, peak) = (
        bytes(&memory["resident_bytes"]),
        bytes(&memory["peak_bytes"]),
    );
    line("memory", format!("{resident}, at most {peak}"));
    text
}

/// Lists options as `-o` takes them.
fn options(options: &Value) -> String {
    let mut all = Vec::new();
    for (name, value) in options.as_object().into_iter().flatten() {
        match value {
            Value::Bool(true) => all.push(name.clone()),
            Value::Bool(false) => {}
            Value::Null if name == "max_import" => {}
            Value::Null => all.push(format!("{name}=off")),
            Value::Number(size) if matches!(name.as_str(), "cache" | "max_import") => {
                let size = BinaryBytes(size.as_u64().unwrap_or(0)).to_string();
                all.push(format!("{name}={}", size.replace(' ', "")));
            }
            Value::String(text) => all.push(format!("{name}={text}")),
            other => all.push(format!("{name}={other}")),
        }
    }
    all.join(",")
}

/// Describes an operation, such as `export of box web: 512.00 MiB of 2.00 GiB, 25 %`.
pub(super) fn operation_line(operation: &Value) -> String {
    let what = operation["what"].as_str().unwrap_or("something");
    let done = bytes(&operation["bytes"]);
    match operation["percent"].as_f64() {
        Some(percent) => {
            let total = bytes(&operation["total_bytes"]);
            format!("{what}: {done} of {total}, {percent} %")
        }
        None => format!("{what}: {done}"),
    }
}

fn bytes(value: &Value) -> String {
    match value.as_u64() {
        Some(bytes) => BinaryBytes(bytes).to_string(),
        None => "?".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn options_are_shown_as_they_are_given() {
        let shown = options(&json!({
            "ro": true, "allow_other": false, "compress": 3, "cache": 4_294_967_296_u64,
            "compact": null, "max_import": null, "import": "untrusted"
        }));
        assert_eq!(
            shown,
            "ro,compress=3,cache=4.00GiB,compact=off,import=untrusted"
        );
        let bounded = options(&json!({"max_import": 2_147_483_648_u64}));
        assert_eq!(bounded, "max_import=2.00GiB");
    }

    #[test]
    fn an_operation_is_told_of_with_its_end_where_that_is_known() {
        let half = json!({"what": "export of box web", "bytes": 1024, "total_bytes": 2048, "percent": 50.0});
        assert_eq!(
            operation_line(&half),
            "export of box web: 1.00 KiB of 2.00 KiB, 50 %"
        );
        let open =
            json!({"what": "import of a", "bytes": 1024, "total_bytes": null, "percent": null});
        assert_eq!(operation_line(&open), "import of a: 1.00 KiB");
    }
}
