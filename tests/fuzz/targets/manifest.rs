//! Parses a hostile `manifest.json`, up to the options of the new box.

#![no_main]

use boxlitefs::archive::{About, Manifest, manifest_bytes};
use boxlitefs::home::{check_options, normalize_imported, redact_secrets};
use libfuzzer_sys::fuzz_target;
use std::time::SystemTime;

fuzz_target!(|bytes: &[u8]| {
    let Ok(manifest) = Manifest::parse(bytes) else {
        return;
    };
    let version = manifest.version;
    assert!((1..=5).contains(&version));
    let options = normalize_imported(manifest.options.unwrap_or_default(), Some(version));
    // With other values, BoxLite would remove the box at its next start.
    assert_eq!(options["auto_remove"], false);
    assert!(options["auto_delete"].is_null());
    let mut shown = options.clone();
    redact_secrets(&mut shown);
    if check_options(&options).is_err() {
        return;
    }
    check_options(&shown).unwrap();
    let about = About {
        box_name: manifest.box_name.clone(),
        image: manifest.image.clone(),
        options: options.clone(),
        changed_at: SystemTime::UNIX_EPOCH,
    };
    let again = Manifest::parse(&manifest_bytes(&about, &[7; 32])).unwrap();
    assert_eq!(again.box_name, manifest.box_name);
    assert_eq!(again.image, manifest.image);
    assert_eq!(again.options.as_ref(), Some(&options));
    assert_eq!(again.disk_digest, Some([7; 32]));
});
