//! A package index of Python (PEP 503 and 691), as far as a pinned wheel needs it.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use reqwest::header::{ACCEPT, CONTENT_TYPE};
use reqwest::{Client, Response, Url};
use serde::Deserialize;
use tokio::fs::File;
use tokio::io::AsyncWriteExt as _;

/// Both forms of a package's page. The page in JSON is preferred.
const FORMS: &str = "application/vnd.pypi.simple.v1+json, text/html;q=0.1";

/// How long the server may be silent.
const SILENCE: Duration = Duration::from_mins(1);

/// Most bytes of a wheel, so that a wrong server does not fill the disk.
const WHEEL_BYTES: u64 = 1 << 30;

/// The index of a binary that was built with one (`scripts/release`).
const BUILT_IN: Option<&str> = option_env!("PACKAGE_INDEX_URL");

/// A package index.
pub struct PackageIndex {
    client: Client,
    address: Url,
}

/// A package's page in JSON.
#[derive(Deserialize)]
struct Page {
    files: Vec<Listed>,
}

#[derive(Deserialize)]
struct Listed {
    url: String,
    hashes: Hashes,
}

#[derive(Deserialize)]
struct Hashes {
    sha256: Option<String>,
}

impl PackageIndex {
    /// The index at this address, else the one that is built in.
    pub fn new(address: Option<&str>) -> anyhow::Result<Self> {
        let Some(address) = address.or(BUILT_IN).filter(|address| !address.is_empty()) else {
            bail!(
                "no package index is named, and none is built in: use --index with the address that pip uses (its \
                 setting index-url), or --wheels DIR with the wheels"
            )
        };
        // The last part of a path without a slash at its end would be replaced by what is joined.
        let address = Url::parse(&format!("{}/", address.trim_end_matches('/')))
            .with_context(|| format!("{address} is not the address of a package index"))?;
        let client = Client::builder()
            .user_agent(concat!("refarch/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(SILENCE)
            .read_timeout(SILENCE)
            .build()?;
        Ok(Self { client, address })
    }

    /// Downloads the wheel of a package that has this hash. The caller checks the hash.
    pub async fn download(&self, package: &str, sha256: &str, path: &Path) -> anyhow::Result<()> {
        let page = self.address.join(&format!("{package}/"))?;
        let response = self.get(page.clone()).await?;
        // A redirect may have led elsewhere, and addresses in the page are relative to that place.
        let base = response.url().clone();
        let is_json =
            response.headers().get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().ends_with(b"json"));
        let text = response.text().await?;
        let found = if is_json { in_json(&text, sha256)? } else { in_html(&text, sha256) };
        let address = found.with_context(|| format!("{page} has no file with sha256 {sha256}"))?;
        let mut response = self.get(base.join(&address)?).await?;
        let mut file = File::create(path).await?;
        let mut room = WHEEL_BYTES;
        while let Some(chunk) = response.chunk().await.context("the download ended early; try again")? {
            room = room.checked_sub(chunk.len() as u64).context("the wheel is too large")?;
            file.write_all(&chunk).await?;
        }
        Ok(file.flush().await?)
    }

    async fn get(&self, address: Url) -> anyhow::Result<Response> {
        let request = self.client.get(address.clone()).header(ACCEPT, FORMS);
        let advice = "without a network, bring the wheels and use --wheels DIR";
        let response = request.send().await.with_context(|| format!("cannot read {address} ({advice})"))?;
        let status = response.status();
        if !status.is_success() {
            bail!("{address} answers {status}");
        }
        Ok(response)
    }
}

fn in_json(text: &str, sha256: &str) -> anyhow::Result<Option<String>> {
    let page: Page = serde_json::from_str(text).context("the package's page is not what PEP 691 says")?;
    let fits = |file: &Listed| file.hashes.sha256.as_deref() == Some(sha256);
    Ok(page.files.into_iter().find(fits).map(|file| file.url))
}

/// The address in a link that ends in the hash.
fn in_html(text: &str, sha256: &str) -> Option<String> {
    let end = format!("#sha256={sha256}");
    let links = text.split("href=\"").skip(1).filter_map(|rest| rest.split('"').next());
    links.filter_map(|link| link.strip_suffix(&end)).map(|link| link.replace("&amp;", "&")).next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_found_by_its_hash_in_both_forms_of_a_page() {
        let json = r#"{"name": "a", "files": [
            {"filename": "a-1.tar.gz", "url": "a-1.tar.gz", "hashes": {}},
            {"filename": "a-2.whl", "url": "../../files/a-2.whl", "hashes": {"sha256": "ab12"}}]}"#;
        assert_eq!(in_json(json, "ab12").unwrap().as_deref(), Some("../../files/a-2.whl"));
        assert_eq!(in_json(json, "ab").unwrap(), None);
        let html = r#"<a href="a-1.whl#sha256=ff">a</a><a class="x" href="/f/a-2.whl?x=1&amp;y=2#sha256=ab12">a</a>"#;
        assert_eq!(in_html(html, "ab12").as_deref(), Some("/f/a-2.whl?x=1&y=2"));
        assert_eq!(in_html(html, "ab"), None);
    }
}
