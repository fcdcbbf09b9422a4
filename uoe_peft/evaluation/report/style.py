"""The looks of a report's page: one column on a telephone, several on a desk."""

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: #1c2330; font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 1.6rem; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 40px 0 8px; border-top: 1px solid #dde1e7; padding-top: 16px; }
h3 { font-size: 1rem; margin: 16px 0 4px; }
p { margin: 4px 0 8px; max-width: 76ch; overflow-wrap: anywhere; }
.quiet { color: #586173; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); gap: 12px 32px; }
figure { margin: 0; } figcaption { font-weight: 600; margin: 12px 0 4px; }
svg { width: 100%; max-width: 440px; height: auto; display: block; font: 12px system-ui, sans-serif; fill: #1c2330; }
svg .label { font-weight: 600; }
.key span { display: inline-block; margin-right: 16px; }
.key i { display: inline-block; width: 12px; height: 12px; border-radius: 2px; margin-right: 6px; }
.wide { margin-top: 12px; overflow-x: auto; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid #e6e9ee; white-space: nowrap; }
th { color: #586173; font-weight: 600; }
article { border: 1px solid #dde1e7; border-radius: 6px; padding: 10px 12px; overflow-wrap: anywhere; }
article h3 { margin: 0 0 6px; white-space: pre-line; } dl { margin: 0; } dt { color: #586173; font-size: .8rem; }
dd { margin: 0 0 6px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8rem; background: #f5f6f8; padding: 10px; }
"""
