//! `config/default.toml`, made of the declarations.

use std::fmt::Write as _;

use super::DEFAULTS;
use super::declare::Rule;
use super::settings::{Settings, keys};
use super::values::default_of;

const HEAD: &str = "\
# Every setting of refarch, with its default.
#
# Order of precedence: flags, then environment variables, then --config FILE, then this file (built
# into the executable). The variable of a setting is REFARCH_<SECTION>_<KEY>, such as
# REFARCH_SERVE_BIND. Durations end in their unit: _ms milliseconds, _s seconds, _h hours.
#
# This file is made of the declarations in src/config/.
";

/// The file as it should be.
fn rendered() -> String {
    let mut text = HEAD.to_owned();
    let (mut section, mut kinds) = ("", [].as_slice());
    for key in keys() {
        if section != key.section {
            let _ = writeln!(text, "\n[{}]", key.section);
        } else if kinds != key.kinds {
            let _ = writeln!(text, "\n# With kind = \"{}\":\n", key.kinds.join("\" or \""));
        }
        (section, kinds) = (key.section, key.kinds);
        for line in key.about {
            let _ = writeln!(text, "#{}", line.replace('`', ""));
        }
        let _ = writeln!(text, "{} = {}", key.name, default_of(key).unwrap());
    }
    text
}

/// With `REFARCH_RENDER_DEFAULTS` set, the file is written anew.
#[test]
fn the_file_of_defaults_is_made_of_the_declarations() {
    if std::env::var_os("REFARCH_RENDER_DEFAULTS").is_some() {
        std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/config/default.toml"), rendered()).unwrap();
    } else {
        let cure = "write it anew: REFARCH_RENDER_DEFAULTS=1 cargo test --lib file_of_defaults";
        assert!(rendered() == DEFAULTS, "{cure}");
    }
}

#[test]
fn every_default_is_a_value_of_its_setting() {
    let settings = Settings::load(None, &std::collections::BTreeMap::new(), &[]).unwrap();
    assert_eq!(settings.as_toml().parse::<toml::Table>().unwrap(), DEFAULTS.parse().unwrap());
}

#[test]
fn no_key_is_declared_twice() {
    let mut paths: Vec<&str> = keys().map(|key| key.path).collect();
    paths.sort_unstable();
    assert!(paths.windows(2).all(|pair| pair[0] != pair[1]));
}

#[test]
fn the_readme_names_the_variables_that_choose_a_service() {
    let readme = include_str!("../../README.md");
    for rule in keys().flat_map(|key| key.rules) {
        if let Rule::Chooses(variable, _) = rule {
            assert!(readme.contains(&format!("`{variable}`")), "{variable}");
        }
    }
}
